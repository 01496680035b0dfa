"""A parity report as JUnit XML, which CI systems show as tests: one suite a variant, one case a stage."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from pocketvlm.export.parity import ParityReport
from pocketvlm.export.parity_stages import StageResult, metric_name, number


def write_junit(report: ParityReport, path: str | Path, *, strict: bool = False) -> Path:
    """Write the report to `path`, whose folder is made.

    Failed stages are failures. Undecided ones are skipped, or failures if `strict`; stages that were not run, not
    compared or of which only the structure was checked are skipped, with the reason. A report without any variant, or
    in which nothing ran, has a failure, so that no CI shows it green.
    """
    root = ElementTree.Element("testsuites", name=f"parity of {report.model or report.bundle['name']}")
    _suite(root, "before any graph ran", report.preflight, 0.0, strict)
    for variant in report.variants:
        _suite(root, variant.name, variant.stages, variant.seconds, strict)
    if report.exit_code and not root.findall(".//failure"):
        case = ElementTree.SubElement(root[0], "testcase", classname="verdict", name="something ran")
        ElementTree.SubElement(case, "failure", message=report.message)
    for suite in root:
        for key, tag in (("tests", "testcase"), ("failures", "failure"), ("skipped", "skipped")):
            suite.set(key, str(len(suite.findall(f".//{tag}"))))
    for key in ("tests", "failures", "skipped"):
        root.set(key, str(sum(int(suite.attrib[key]) for suite in root)))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    ElementTree.indent(root)
    ElementTree.ElementTree(root).write(path, encoding="utf-8", xml_declaration=True)
    return path


def _suite(root: ElementTree.Element, name: str, stages: list[StageResult], seconds: float, strict: bool) -> None:
    suite = ElementTree.SubElement(root, "testsuite", name=name, time=f"{seconds:.2f}")
    for stage in stages:
        case = ElementTree.SubElement(suite, "testcase", classname=name, name=f"{stage.stage} {stage.title}")
        if stage.status == "fail" or (strict and stage.status == "undecided"):
            failure = ElementTree.SubElement(case, "failure", message=stage.message)
            failure.text = "\n".join(
                f"{check.where}: {metric_name(check.metric)} {number(check.metric, check.value)}, "
                f"budget {number(check.metric, check.limit)}, {check.status}"
                for check in stage.checks
            )
        elif stage.status != "pass":
            ElementTree.SubElement(case, "skipped", message=f"{stage.status}: {stage.message}")
