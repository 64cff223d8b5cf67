"""The roofline of compiled text: loops unrolled, gathers by their rows, updates in place, atomics, implicit matmuls."""

import pytest

from benchmarks import hlo_roofline
from benchmarks.hlo_roofline import H200, Maps, estimate, parse

TEXT = """\
HloModule jit_f, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused_gather (p0: bf16[1000,64], p1: s32[10,1]) -> bf16[10,64] {
  %p0 = bf16[1000,64]{1,0} parameter(0)
  %p1 = s32[10,1]{1,0} parameter(1)
  ROOT %rows = bf16[10,64]{1,0} gather(%p0, %p1), offset_dims={1}, slice_sizes={1,64}
}

%fused_dot (p0: bf16[10,64], p1: bf16[64,32]) -> f32[10,32] {
  %p0 = bf16[10,64]{1,0} parameter(0)
  %p1 = bf16[64,32]{1,0} parameter(1)
  ROOT %dot = f32[10,32]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%fused_scatter (p0: f32[500,32], p1: s32[10,1], p2: f32[10,32]) -> f32[500,32] {
  %p0 = f32[500,32]{1,0} parameter(0)
  %p1 = s32[10,1]{1,0} parameter(1)
  %p2 = f32[10,32]{1,0} parameter(2)
  ROOT %scattered = f32[500,32]{1,0} scatter(%p0, %p1, %p2), UNIQUE to_apply=%add
}

%body (state: (s32[], f32[500,32])) -> (s32[], f32[500,32]) {
  %state = (s32[], f32[500,32]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %total = f32[500,32]{1,0} get-tuple-element(%state), index=1
  %x = bf16[1000,64]{1,0} constant({...})
  %w = bf16[64,32]{1,0} constant({...})
  %index = s32[10,1]{1,0} constant({...})
  %gathered = bf16[10,64]{1,0} fusion(%x, %index), kind=kLoop, calls=%fused_gather
  %products = f32[10,32]{1,0} fusion(%gathered, /*index=1*/%w), kind=kCustom, calls=%fused_dot
  %added = f32[500,32]{1,0} fusion(%total, %index, %products), kind=kInput, calls=%fused_scatter
  ROOT %next = (s32[], f32[500,32]{1,0}) tuple(%i, %added)
}

ENTRY %main (start: f32[500,32]) -> f32[500,32] {
  %start = f32[500,32]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %first = (s32[], f32[500,32]{1,0}) tuple(%zero, %start)
  %loop = (s32[], f32[500,32]{1,0}) while(%first), condition=%body, body=%body, config={"known_trip_count":{"n":"3"}}
  ROOT %result = f32[500,32]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_loops_gathers_and_updates_in_place():
    cost = estimate(parse(TEXT.replace("UNIQUE", "unique_indices=true,")))
    assert cost.launches == 9 and cost.atomics == 0
    assert cost.flop == 3 * 2 * 10 * 64 * 32
    gather = 2 * 10 * 64 * 2 + 10 * 4
    matmul = (10 * 64 + 64 * 32) * 2 + 10 * 32 * 4
    scatter = 10 * 4 + 3 * 10 * 32 * 4  # indices; updates read, rows read and written
    assert cost.traffic == 3 * (gather + matmul + scatter)
    assert {kind: parts["launches"] for kind, parts in cost.by_kind.items()} == {"gather": 3, "matmul": 3, "scatter": 3}
    assert cost.seconds == pytest.approx(9 * H200.launch, rel=1e-2)


def test_scatters_whose_indices_may_repeat_are_counted():
    assert estimate(parse(TEXT.replace("UNIQUE", ""))).atomics == 3


def test_precision_decides_the_rate_of_float32_products():
    wide = TEXT.replace("bf16", "f32").replace("UNIQUE", "").replace("64", "640").replace("32]", "320]")
    wide = wide.replace("10", "100000")
    exact = wide.replace("rhs_contracting_dims={0}", "rhs_contracting_dims={0}, operand_precision={highest,highest}")
    seconds = [estimate(parse(text)).by_kind["matmul"]["seconds"] for text in (wide, exact)]
    assert seconds[0] < seconds[1] == pytest.approx(3 * (2e5 * 640 * 320 / H200.products["f32"] + H200.launch))


IMPLICIT = """\
ENTRY %main (x: bf16[1000,64]) -> f32[900,128] {
  %x = bf16[1000,64]{1,0} parameter(0)
  %start = s32[8]{0} constant({...})
  %index = s32[2,27]{1,0} constant({...})
  %table = s32[27,900]{1,0} constant({...})
  %w = bf16[27,64,128]{2,1,0} constant({...})
  ROOT %y = f32[900,128]{1,0} custom-call(%start, %start, %start, %index, %table, %x, %w), \
custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="implicit_rows"}, backend_config={ir = "f32[9]"}
}
"""


def test_implicit_matmuls_read_the_rows_of_existing_pairs():
    cost = estimate(parse(IMPLICIT), Maps({(27, 900, 1000): 5000.0}))
    assert cost.flop == 2 * 8 * 128 * 27 * 64 * 128
    assert cost.traffic == 5000 * 64 * 2 + 27 * 900 * 4 + 900 * 128 * 4 + 27 * 64 * 128 * 2
    with pytest.raises(ValueError, match="27 offsets from 1000 to 900 rows"):
        estimate(parse(IMPLICIT))


def test_a_text_without_program_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        parse("HloModule empty")
    assert hlo_roofline.BYTES["bf16"] == 2
