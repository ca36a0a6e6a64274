"""Write the dashboard: `python deploy/grafana/make_dashboard.py`. Rows ask the operator's questions in order."""

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SOURCE = {"type": "prometheus", "uid": "prometheus"}

# Row title, then panels: (title, unit, [(query, legend)]).
ROWS: list[tuple[str, list[tuple[str, str, list[tuple[str, str]]]]]] = [
    (
        "Is it healthy?",
        [
            ("Requests", "reqps", [("sum by (code) (rate(tta_requests_total[1m]))", "{{code}}")]),
            (
                "Latency",
                "s",
                [
                    (
                        f"histogram_quantile({q}, sum by (le) (rate(tta_request_duration_seconds_bucket[1m])))",
                        f"p{p}",
                    )
                    for q, p in ((0.5, 50), (0.95, 95), (0.99, 99))
                ],
            ),
            ("Processes", "bool_yes_no", [("tta_process_up", "{{process}}")]),
        ],
    ),
    (
        "Is it drifting?",
        [
            (
                "Drift over threshold, by block",
                "none",
                [
                    ("tta_drift_statistic", "{{block}}"),
                    ("tta_class_statistic", "predicted classes"),
                    ("tta_conformal_statistic", "slow tier"),
                ],
            ),
            ("Labelled errors over threshold", "none", [("tta_label_statistic", "errors")]),
            ("Regime (0 is home)", "none", [("tta_regime", "regime")]),
        ],
    ),
    (
        "Can its alarms be trusted?",
        [
            (
                "Expected false alarms a day",
                "none",
                [("tta_expected_false_alarms_per_day", "at the present rate")],
            ),
            (
                "Alarms and notices",
                "short",
                [("tta_alarms_total", "alarm: {{cause}}"), ("tta_notices_total", "notice: {{kind}}")],
            ),
            (
                "Stickiness, and samples left out",
                "none",
                [
                    ("tta_stickiness", "chance of a repeat"),
                    ("rate(tta_samples_thinned_total[1m])", "of chatty keys, a second"),
                    ("rate(tta_features_refused_total[1m])", "not finite, a second"),
                ],
            ),
        ],
    ),
    (
        "What did it do about it?",
        [
            ("State", "none", [("tta_state == 1", "{{state}}")]),
            ("Version in service (0 is the source)", "none", [("tta_weight_version", "version")]),
            (
                "Candidates and swaps",
                "short",
                [
                    ("tta_adaptations_total", "{{block}} {{outcome}}"),
                    ("tta_swaps_total", "swap: {{reason}} {{result}}"),
                ],
            ),
        ],
    ),
    (
        "Did it help?",
        [
            (
                "Accuracy on the last labels",
                "percentunit",
                [("tta_labelled_accuracy", "{{model}}"), ("tta_predicted_accuracy", "source, by its confidence")],
            ),
            ("Labels received", "short", [("tta_labels_total", "{{outcome}}")]),
            ("Labels still wanted", "short", [("tta_labels_wanted", "wanted")]),
        ],
    ),
    (
        "What does it cost?",
        [
            ("Images", "short", [("rate(tta_images_total[1m])", "images/s")]),
            (
                "Seconds a swap takes to prepare",
                "s",
                [("tta_swap_duration_seconds_sum / tta_swap_duration_seconds_count", "{{phase}}")],
            ),
            (
                "Not seen by the monitor",
                "short",
                [
                    ("rate(tta_observations_dropped_total[1m])", "batches"),
                    ("rate(tta_shadow_images_dropped_total[1m])", "images the shadow had no time for"),
                ],
            ),
        ],
    ),
]

ANNOTATIONS = {
    "Alarm": "changes(tta_alarms_total[30s]) > 0",
    "Swap": "changes(tta_weight_version[30s]) > 0",
}


def dashboard() -> dict[str, Any]:
    """The dashboard's JSON model."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS:
        panels.append(
            {"type": "row", "title": title, "id": len(panels) + 1, "gridPos": _at(0, y, 24, 1), "panels": []}
        )
        y += 1
        for i, (name, unit, queries) in enumerate(row):
            panels.append(
                {
                    "type": "timeseries",
                    "title": name,
                    "id": len(panels) + 1,
                    "datasource": SOURCE,
                    "gridPos": _at(8 * i, y, 8, 7),
                    "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
                    "options": {"legend": {"displayMode": "list", "placement": "bottom"}},
                    "targets": [
                        {"refId": chr(65 + j), "datasource": SOURCE, "expr": expr, "legendFormat": legend}
                        for j, (expr, legend) in enumerate(queries)
                    ],
                }
            )
        y += 7
    return {
        "uid": "tta",
        "title": "tta",
        "schemaVersion": 41,
        "refresh": "5s",
        "time": {"from": "now-30m", "to": "now"},
        "annotations": {
            "list": [
                {"name": name, "datasource": SOURCE, "expr": expr, "enable": True, "iconColor": "red"}
                for name, expr in ANNOTATIONS.items()
            ]
        },
        "panels": panels,
    }


def _at(x: int, y: int, w: int, h: int) -> dict[str, int]:
    return {"x": x, "y": y, "w": w, "h": h}


if __name__ == "__main__":
    (HERE / "dashboards" / "tta.json").write_text(json.dumps(dashboard(), indent=1) + "\n")
