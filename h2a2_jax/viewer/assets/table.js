// The boxes shown as a table for a spreadsheet: tab-separated text.

const COLUMNS = ["class", "score", "x (m)", "y (m)", "z (m)", "dx (m)", "dy (m)", "dz (m)", "yaw (rad)"];

// Text from files as a cell: a spreadsheet would run one that begins like a formula, and split one at tabs, line breaks
// and quotes.
function tableCell(text) {
  const line = text.replace(/[\t\r\n\v\f\u2028\u2029]+/g, " ");
  const plain = /^\s*[=+\-@＝＋－＠]/.test(line) ? `'${line}` : line;
  return plain.includes('"') ? `"${plain.replaceAll('"', '""')}"` : plain;
}

function tableText(boxes, withTruth) {
  const rows = boxes.map((box) => [
    tableCell(box.name),
    box.isTruth ? "" : box.score.toFixed(4),
    ...box.numbers.map((number) => number.toFixed(4)),
    ...(withTruth ? [box.isTruth ? "ground truth" : "detection"] : []),
  ]);
  return [[...COLUMNS, ...(withTruth ? ["kind"] : [])], ...rows].map((row) => row.join("\t")).join("\n") + "\n";
}

// Copies the table, or shows it as text to copy where the browser refuses.
async function copyTable(model) {
  const { shown } = model;
  const text = tableText(shown, model.truth);
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = byId("table-text");
    area.value = text;
    byId("table").showModal();
    area.select();
    return;
  }
  byId("copied").textContent = `${plural(shown.length, "row")} copied.`;
}
