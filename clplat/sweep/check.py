"""What a sweep would meet in every trial, found before the first: trials built, not run."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from clplat.config.resolve import resolve
from clplat.errors import MissingError, UserError
from clplat.run.build import build
from clplat.run.trying import all_faults
from clplat.sweep.objectives import check_kinds
from clplat.sweep.plan import Plan, named_fault
from clplat.sweep.protocol import protocol_faults


def check(plan: Plan, keys: Sequence[str]) -> None:
    """Build the trials at both ends of every range and with every choice, on validation data as all are.

    Raises:
        UserError: one line for each fault; of a searched key, under its name in the file.
        MissingError: data or weights are not there, and nothing else is wrong.
    """
    faults, missing, kinds, lengths = dict[str, None](), dict[str, None](), set[str](), set[int]()
    queue = list(itertools.product(_corners(plan), plan.protocol.streams or [None]))
    for values, stream in queue:  # which grows
        try:
            with all_faults():
                resolved = resolve(argv=list(keys), config=plan.config(values, plan.seeds[0], "trial", stream))
            if resolved.loop.evaluate_on != "valid":
                raise UserError("loop.evaluate_on: 'test' would choose hyper-parameters on test labels (valid: valid)")
            if plan.pruner != "none" and resolved.fabric.devices * resolved.fabric.num_nodes > 1:
                raise UserError(f"sweep.pruner: {plan.pruner} needs runs in one process (valid: none)")
            built = build(resolved)[0]
            kinds |= {str(e.kind) for e in built}
            lengths.add(len(built))
        except UserError as error:
            faults |= dict.fromkeys(_named(plan, fault, stream) for fault in error.faults)
            told = {fault.partition(":")[0] for fault in error.faults}
            rest = {key: value for key, value in values.items() if key not in told}  # whose faults it may hide
            if len(rest) < len(values) and (rest, stream) not in queue:
                queue.append((rest, stream))
        except MissingError as error:
            missing |= dict.fromkeys(error.faults)
    faults |= dict.fromkeys(check_kinds(plan.metrics, kinds))
    faults |= dict.fromkeys(protocol_faults(plan.protocol, plan.metrics, lengths))
    if faults:
        raise UserError(*faults, *missing)
    if missing:
        raise MissingError(*missing)


def _corners(plan: Plan) -> Iterator[dict[str, Any]]:
    """All lowest values, all highest, and each further choice beside the lowest ones."""
    lowest = {key: span.ends()[0] for key, span in plan.space.items()}
    yield lowest
    yield {key: span.ends()[-1] for key, span in plan.space.items()}
    for key, span in plan.space.items():
        for choice in span.choices[1:-1]:
            yield lowest | {key: choice}


def _named(plan: Plan, fault: str, stream: Any) -> str:
    if stream is not None and fault.startswith(("stream:", "stream.")):
        return f"sweep.protocol.{fault}"
    if fault.startswith("loop.evaluate_on:"):
        return f"sweep: trials are scored on validation data: {fault}"
    return named_fault(plan.space, fault)
