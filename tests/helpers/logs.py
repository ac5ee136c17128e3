"""Helpers of `test_report.py` that other tests share."""

import json


def log_lines(steps: int = 40) -> str:
    lines = []
    for step in range(1, steps + 1):
        lines.append({
            "step": step, "loss/pixel": 1 / step, "loss/kl": 1000.0 + step, "share/pixel": 0.6,
            "share/learned": 0.4, "critic/real_logit": 0.5, "learning_rate/first_stage": 1e-4,
        })  # fmt: skip
        if step % 10 == 0:
            lines.append({"step": step, "validation/psnr": 20 + step / 10})
    return "".join(json.dumps(line) + "\n" for line in lines)
