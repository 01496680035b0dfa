"""A plan for people: rows of a table, with units that can be read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pocketvlm.distill.plan import Plan


PREPARE = "decoding all once, what lies below a cut"


def plan_rows(plan: Plan) -> list[dict[str, str]]:
    """One row per number: what it is, its value, and a remark."""
    run, work, memory, disk, time = (plan.values[name] for name in ("run", "work", "memory", "disk", "time"))
    counted = "counted in a rehearsal"
    clock = "timed here" if plan.device == "here" else "by the device's constants"
    rows: list[tuple[str, str, str]] = [
        ("pictures", amount(run["pictures"]), f"{100 * run['captioned_share']:.0f} % of a batch with captions"),
        ("steps", f"{run['steps']:,}", f"of {run['batch']:,} pictures; {run['epochs']:.3g} passes over them"),
    ]
    if run["text_batch"]:
        rows.append(
            (
                "texts beside",
                f"{run['text_batch']:,} a step",
                f"{run['text_pretrain_steps']:,} steps of them alone first",
            )
        )
    rows += [
        ("student, a picture", macs(work["student_picture_macs"]), "MACs forward"),
        ("student, a caption", macs(work["student_caption_macs"]), "MACs forward"),
        (
            "training, a picture", macs(work["train_macs_per_picture"]),
            f"MACs with its texts: {work['train_over_forward']:.2f} x forward (3: nothing frozen, cut or repeated)",
        ),
        ("objectives", f"{100 * work['objectives_share']:.2f} %", "of the MACs of a step"),
    ]  # fmt: skip
    taught = work["cache_macs"] != 0
    if taught:
        rows += [
            ("teacher, a view", macs(work["teacher_picture_macs"]), "MACs, once for the cache"),
            ("teacher, a caption", macs(work["teacher_caption_macs"]), "MACs, once for the cache"),
        ]
    rows += [
        ("parameters", amount(memory["parameters"]), f"{amount(memory['trained_parameters'])} trained"),
        ("weights, gradients", size(memory["weights_bytes"] + memory["gradient_bytes"]), counted),
        ("optimizer", size(memory["optimizer_bytes"]), "AdamW, two moments of what is trained"),
        ("moving average", size(memory["average_bytes"]), "train.ema_decay"),
        (
            "activations", size(memory["activation_bytes"]),
            f"a device; {size(memory['activation_bytes_per_picture'])} a picture with its texts",
        ),
        ("objectives' memory", size(memory["objective_bytes"]), "similarity matrices and heads, whole on every device"),
        ("memory of a device", size(memory["device_bytes"]), _fits(memory)),
        ("pictures on disk", size(disk["data_bytes"]), "encoded"),
    ]  # fmt: skip
    if taught:
        rows += [
            (
                "teacher cache", size(disk["cache_bytes"]),
                f"{disk['cache_dtype']}, {disk['cache_bytes_per_view']:,.0f} B a view ({run['views']}), "
                f"{disk['cache_bytes_per_text']:,.0f} B a text",
            ),
            (
                "cache, other dtype",
                size(disk["cache_bytes_bfloat16" if disk["cache_dtype"] == "float32" else "cache_bytes_float32"]),
                "bfloat16" if disk["cache_dtype"] == "float32" else "float32",
            ),
        ]  # fmt: skip
    if disk["below_cut_bytes"]:
        rows.append(("outputs below the cut", size(disk["below_cut_bytes"]), "on disk and in memory"))
    rows += [
        ("a checkpoint", size(disk["checkpoint_bytes"]), ""),
        *([("cache, once", span(time["cache_s"]), clock)] if taught else []),
        *([("prepare", span(time["prepare_s"]), PREPARE)] if time["prepare_s"] else []),
        ("train", span(time["training_s"]), f"{clock}; {span(time['step_s'])} a step"),
        ("bound by", time["bound"], f"computing {span(time['compute_s'])}, decoding {span(time['decode_s'])}"),
    ]
    if "training_cpu_s" in time:
        rows.append(("train, processor", span(time["training_cpu_s"]), "seconds of all threads together"))
    if taught:
        rows.append(("teacher online", span(time["online_teacher_s"]), "what a run without a cache would add"))
    hours = time["device_hours"]
    told = f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"
    rows += [
        ("in all", span(time["total_s"]), f"{told} device-hours on {plan.count} x {plan.device}"),
    ]
    if time["cost"] is not None:
        rows.append(("cost", f"{time['cost']:,.2f}", "device-hours x --price"))
    return [{"quantity": what, "value": value, "remark": remark} for what, value, remark in rows]


def _fits(memory: dict[str, Any]) -> str:
    if memory["fits"] is None:
        return "not compared with this machine's"
    has = size(memory["device_has_bytes"])
    if memory["fits"]:
        return f"of {has}"
    if memory["activation_bytes"] > memory["objective_bytes"]:
        return f"does not fit into {has}: split the batch over more devices, or into train.micro_batch"
    return f"does not fit into {has}: every device holds the objectives of the whole batch, so lower train.batch_size"


def amount(value: float) -> str:
    """A count with three digits: 762, 11.6 M, 1.00 B."""
    for limit, unit in ((1e9, "B"), (1e6, "M")):
        if value >= limit:
            return f"{value / limit:,.4g} {unit}"
    return f"{value:,.0f}"


def macs(value: float | None) -> str:
    """Multiply-accumulates."""
    if value is None:
        return "not known"
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= limit:
            return f"{value / limit:,.3g} {unit}"
    return f"{value:,.0f}"


def size(value: float) -> str:
    """Bytes, in powers of a thousand."""
    for limit, unit in ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= 0.9995 * limit:  # what three digits would round up to a thousand is one of the next unit
            return f"{value / limit:,.3g} {unit}"
    return f"{value:,.0f} B"


def span(value: float | None) -> str:
    """A time, in the unit that suits it."""
    if value is None:
        return "not known"
    for limit, divisor, unit in (
        (2 * 86_400, 86_400, "days"),
        (2 * 3600, 3600, "hours"),
        (120, 60, "min"),
        (1, 1, "s"),
    ):
        if value >= limit:
            return f"{value / divisor:,.3g} {unit}"
    return f"{1e3 * value:,.3g} ms"
