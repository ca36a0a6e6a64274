"""Drive a real daemon through phases of traffic with a real client, and measure what it did.

Used by `tta demo` and by the benchmarks. Accuracy is always on images that were never labelled; every reply is
checked afterwards against the version it names; the source's accuracy is that of the source on the same images.
"""

from tta.scenario.process import DaemonProcess, free_ports
from tta.scenario.report import PhaseReport, Report, measure
from tta.scenario.run import Phase, Scenario
from tta.scenario.timeline import draw_timeline

__all__ = [
    "DaemonProcess",
    "Phase",
    "PhaseReport",
    "Report",
    "Scenario",
    "draw_timeline",
    "free_ports",
    "measure",
]
