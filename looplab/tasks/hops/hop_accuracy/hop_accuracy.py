"""Accuracy of one-token answers, overall and per group (hops, split_kind): an `evaluate` module.

    metric = evaluate.load("<this folder>")
    metric.compute(predictions=[7, 3], references=[7, 4], hops=[2, 3], split_kind=["id", "ood"])
    -> {"accuracy": 0.5, "n": 2, "groups": [{"hops": 2, "split_kind": "id", "accuracy": 1.0, "n": 1}, ...]}

A prediction is right when the full-vocabulary argmax at the readout equals the gold token (arXiv 2604.07822).
"""

import datasets
import evaluate
import numpy as np


class HopAccuracy(evaluate.Metric):
    """Exact match of token ids; `groups` is sorted by split_kind, then hops. Accuracies are fractions in [0, 1]."""

    def _info(self):
        return evaluate.MetricInfo(
            description="Share of answers that equal the gold token, overall and per (hops, split_kind).",
            citation="",
            inputs_description="Token ids `predictions` and `references`, int `hops`, str `split_kind`: one per row.",
            features=datasets.Features(
                {
                    "predictions": datasets.Value("int64"),
                    "references": datasets.Value("int64"),
                    "hops": datasets.Value("int32"),
                    "split_kind": datasets.Value("string"),
                }
            ),
        )

    def _compute(self, predictions, references, hops, split_kind):
        correct = np.asarray(predictions) == np.asarray(references)
        hops, split_kind = np.asarray(hops), np.asarray(split_kind)
        groups = []
        for kind, count in sorted(set(zip(split_kind.tolist(), hops.tolist(), strict=True))):
            members = (split_kind == kind) & (hops == count)
            accuracy = float(correct[members].mean())
            groups.append({"hops": count, "split_kind": kind, "accuracy": accuracy, "n": int(members.sum())})
        return {"accuracy": float(correct.mean()), "n": len(correct), "groups": groups}
