"""The paper's premise, measured: detectors trained on different datasets respond through the same offsets."""
