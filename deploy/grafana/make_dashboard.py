"""Write the dashboard: `python deploy/grafana/make_dashboard.py`. Rows ask the operator's questions in order.

Built with Grafana's foundation SDK (`pip install grafana-foundation-sdk`), so that it follows Grafana's schema.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.builders import bargauge, common, prometheus, stat, statetimeline, timeseries
from grafana_foundation_sdk.builders import dashboard as board
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as kinds
from grafana_foundation_sdk.models import dashboard as models

HERE = Path(__file__).parent
SOURCE = models.DataSourceRef(type_val="prometheus", uid="$datasource")
WIDE, STAT = 8, 4  # columns of 24
TALL, LOW = 8, 4  # rows

Queries = Sequence[tuple[str, str]]  # expression and legend; $i stands for the chosen daemons

# A panel: kind, title, what it says, unit, queries. Kinds: lines, statistic (lines on a logarithmic scale with the
# threshold at 1), stat, tall stat, states (over time), bars.
Panel = tuple[str, str, str, str, Queries]

QUANTILES = [
    (f"histogram_quantile({q}, sum by (le) (rate(tta_request_duration_seconds_bucket{{$i}}[1m])))", f"p{p}")
    for q, p in ((0.5, 50), (0.95, 95), (0.99, 99))
]
ACCURACY_GAIN = (
    'max by (instance) (tta_labelled_accuracy{$i, model="serving"})'
    ' - max by (instance) (tta_labelled_accuracy{$i, model="source"})'
)
ROWS: list[tuple[str, list[Panel]]] = [
    (
        "Is it healthy?",
        [
            ("stat", "State", "Of the cycle", "none", [("tta_state{$i} == 1", "{{state}}")]),
            ("stat", "Version", "In service; 0 is the source model", "none", [("tta_weight_version{$i}", "")]),
            ("stat", "Requests", "Answered, a second", "reqps", [("sum(rate(tta_requests_total{$i}[1m]))", "")]),
            ("stat", "p99", "Arrival to reply, in the server", "s", [QUANTILES[2]]),
            (
                "stat",
                "Refused",
                "Of all requests, on arrival",
                "percentunit",
                [
                    (
                        "sum(rate(tta_rejected_total{$i}[5m])) / clamp_min("
                        "sum(rate(tta_rejected_total{$i}[5m])) + sum(rate(tta_requests_total{$i}[5m])), 0.001)",
                        "",
                    )
                ],
            ),
            (
                "stat",
                "Accuracy gained",
                "On the last labels: the serving version's less the source model's",
                "percentunit",
                [(ACCURACY_GAIN, "")],
            ),
            (
                "lines",
                "Requests",
                "By the code of the reply; beneath, refused on arrival",
                "reqps",
                [
                    ("sum by (code) (rate(tta_requests_total{$i}[1m]))", "{{code}}"),
                    ("sum by (code) (rate(tta_rejected_total{$i}[1m]))", "refused: {{code}}"),
                ],
            ),
            ("lines", "Latency", "Arrival to reply, in the server", "s", QUANTILES),
            (
                "states",
                "Processes",
                "1: ready. The adapter comes when there is work and goes",
                "none",
                [("tta_process_up{$i}", "{{process}}")],
            ),
        ],
    ),
    (
        "Is it drifting?",
        [
            (
                "statistic",
                "Drift over threshold, by block",
                "Above 1 is an alarm; the deepest block that moves first tells the kind",
                "none",
                [
                    ("tta_drift_statistic{$i}", "{{block}}"),
                    ("tta_class_statistic{$i}", "predicted classes"),
                    ("tta_conformal_statistic{$i}", "slow tier"),
                ],
            ),
            (
                "states",
                "Kind of shift",
                "Input, feature, class prior, output; unknown until diagnosed",
                "none",
                [("tta_shift{$i} == 1 or on () vector(0)", "{{kind}}")],
            ),
            (
                "tall stat",
                "Since",
                "When the present shift was found",
                "dateTimeFromNow",
                [("1000 * (tta_shift_start_timestamp_seconds{$i} > 0)", "")],
            ),
            ("tall stat", "Regime", "0 is home", "none", [("tta_regime{$i}", "")]),
            (
                "statistic",
                "Labelled errors over threshold",
                "Above 1 is an alarm by labels alone",
                "none",
                [("tta_label_statistic{$i}", "errors")],
            ),
            (
                "lines",
                "Alarms and notices",
                "Notices are shifts that are no reason to act",
                "short",
                [("tta_alarms_total{$i}", "alarm: {{cause}}"), ("tta_notices_total{$i}", "notice: {{kind}}")],
            ),
            (
                "lines",
                "Can its alarms be trusted?",
                "False alarms a day as set, at the present rate; chance of a repeat that thresholds are for",
                "none",
                [
                    ("tta_expected_false_alarms_per_day{$i}", "false alarms a day"),
                    ("tta_stickiness{$i}", "stickiness"),
                ],
            ),
        ],
    ),
    (
        "What did it do about it?",
        [
            ("states", "State", "Of the cycle", "none", [("tta_state{$i}", "{{state}}")]),
            (
                "states",
                "Version in service",
                "0 is the source model",
                "none",
                [("tta_weight_version{$i}", "version")],
            ),
            (
                "lines",
                "Candidates and swaps",
                "Since the daemon's start",
                "short",
                [
                    ("tta_adaptations_total{$i}", "{{block}} {{outcome}}"),
                    ("tta_swaps_total{$i}", "swap: {{reason}} {{result}}"),
                ],
            ),
            (
                "bars",
                "Newest verdict of the gate",
                "Accuracy on labels that were not fitted on, and on the clean anchor images",
                "percentunit",
                [("tta_gate_accuracy{$i}", "{{model}}, {{images}}")],
            ),
            (
                "lines",
                "Evidence of the newest verdict",
                "Accepted at p of at most alpha; how many labels it had and would still need",
                "short",
                [
                    ("tta_gate_p_value{$i}", "p"),
                    ("tta_gate_labels{$i}", "labels"),
                    ("tta_gate_labels_needed{$i}", "needed"),
                ],
            ),
            (
                "lines",
                "Adaptation under way",
                "Share done",
                "percentunit",
                [("tta_adaptation_progress{$i}", "done")],
            ),
        ],
    ),
    (
        "Did it help?",
        [
            (
                "lines",
                "Accuracy on the last labels",
                "Of what serves, and of the source model on the same images",
                "percentunit",
                [
                    ("tta_labelled_accuracy{$i}", "{{model}}"),
                    ("tta_predicted_accuracy{$i}", "source, by its confidence"),
                ],
            ),
            ("lines", "Labels received", "By outcome", "short", [("tta_labels_total{$i}", "{{outcome}}")]),
            (
                "lines",
                "Labels still wanted",
                "Before the next adaptation",
                "short",
                [("tta_labels_wanted{$i}", "wanted"), ("tta_labels_buffered{$i}", "on disk")],
            ),
        ],
    ),
    (
        "What does it cost?",
        [
            (
                "lines",
                "Images",
                "Predicted, and waiting",
                "short",
                [("rate(tta_images_total{$i}[1m])", "a second"), ("tta_queue_images{$i}", "queued")],
            ),
            (
                "lines",
                "Seconds of adaptations and swaps",
                "Mean of each phase",
                "s",
                [
                    (
                        "tta_adaptation_duration_seconds_sum{$i} / tta_adaptation_duration_seconds_count{$i}",
                        "adaptation: {{phase}}",
                    ),
                    ("tta_swap_duration_seconds_sum{$i} / tta_swap_duration_seconds_count{$i}", "swap: {{phase}}"),
                ],
            ),
            (
                "lines",
                "Not seen by the monitor",
                "A second: the hot path drops observations rather than wait",
                "short",
                [
                    ("rate(tta_observations_dropped_total{$i}[1m])", "batches"),
                    ("rate(tta_shadow_images_dropped_total{$i}[1m])", "images the shadow had no time for"),
                    ("rate(tta_samples_thinned_total{$i}[1m])", "of chatty keys"),
                    ("rate(tta_features_refused_total{$i}[1m])", "not finite"),
                ],
            ),
            (
                "lines",
                "Memory",
                "By process; the server holds two versions from a swap until the new one has proved itself",
                "bytes",
                [("tta_process_memory_bytes{$i}", "{{process}}")],
            ),
        ],
    ),
]
ANNOTATIONS = [  # name, expression, text, colour
    ("Alarm", "changes(tta_alarms_total{$i}[$__interval]) > 0", "alarm: {{cause}}", "red"),
    ("Swap", 'changes(tta_swaps_total{$i, reason!~"rollback|reset"}[$__interval]) > 0', "{{reason}}", "green"),
    (
        "Back",
        'changes(tta_swaps_total{$i, reason=~"rollback|reset"}[$__interval]) > 0',
        "{{reason}}",
        "orange",
    ),
]


def expression(text: str) -> str:
    """With the chosen daemons in place of $i."""
    return text.replace("$i", 'instance=~"$instance"')


def _panel(panel: Panel, number: int) -> Any:
    kind, title, says, unit, queries = panel
    made: Any
    if kind.endswith("stat"):
        made = stat.Panel().span(STAT).height(LOW if kind == "stat" else TALL)
        made.color_mode(kinds.BigValueColorMode.NONE).graph_mode(kinds.BigValueGraphMode.NONE)
        made.no_value("none")
        made.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        if title == "State":
            made.text_mode(kinds.BigValueTextMode.NAME)
    elif kind == "states":
        made = statetimeline.Panel().span(WIDE).height(TALL).merge_values(True)
    elif kind == "bars":
        made = bargauge.Panel().span(WIDE).height(TALL).min(0).max(1)
        made.orientation(kinds.VizOrientation.HORIZONTAL)
    else:
        made = timeseries.Panel().span(WIDE).height(TALL).line_width(1)
        if kind == "statistic":
            made.scale_distribution(common.ScaleDistributionConfig().type(kinds.ScaleDistribution.LOG).log(10))
            steps = [
                models.Threshold(value=value, color=colour) for value, colour in ((None, "green"), (1, "red"))
            ]
            made.thresholds(board.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps))
            made.thresholds_style(common.GraphThresholdsStyleConfig().mode(kinds.GraphTresholdsStyleMode.DASHED))
        else:
            made.min(0)
        shown = common.VizLegendOptions().display_mode(kinds.LegendDisplayMode.LIST)
        made.legend(shown.placement(kinds.LegendPlacement.BOTTOM).show_legend(True))
    made.id(number).title(title).description(says).unit(unit).datasource(SOURCE)
    for letter, (text, legend) in zip("ABCDEFGH", queries, strict=False):
        query = prometheus.Dataquery().ref_id(letter).expr(expression(text)).legend_format(legend)
        if kind.endswith("stat"):
            query.instant()  # what is, not what has been
        made.with_target(query.datasource(SOURCE))
    return made


def dashboard() -> dict[str, Any]:
    """The dashboard's JSON model."""
    made = board.Dashboard("tta").uid("tta").refresh("5s").time("now-30m", "now").tags(["tta"])
    made.tooltip(models.DashboardCursorSync.CROSSHAIR)
    made.with_variable(board.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
    made.with_variable(
        board.QueryVariable("instance")
        .label("daemon")
        .datasource(SOURCE)
        .query("label_values(tta_model_info, instance)")
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(models.VariableOption(selected=True, text="All", value="$__all"))
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
    )
    for name, text, _, colour in ANNOTATIONS:
        annotation = board.AnnotationQuery().name(name).datasource(SOURCE).enable(True).icon_color(colour)
        annotation.expr(expression(text))
        made.annotation(annotation)
    number = 0
    for title, panels in ROWS:
        number += 1
        made.with_row(board.Row(title).id(number))
        for panel in panels:
            number += 1
            made.with_panel(_panel(panel, number))
    found: dict[str, Any] = json.loads(json.dumps(made.build(), cls=JSONEncoder))
    for annotation, (_, _, title, _) in zip(found["annotations"]["list"], ANNOTATIONS, strict=True):
        annotation["titleFormat"] = title  # Prometheus' own field, which the SDK's type leaves out
    return found


if __name__ == "__main__":
    (HERE / "dashboards" / "tta.json").write_text(json.dumps(dashboard(), indent=1) + "\n")
