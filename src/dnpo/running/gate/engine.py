"""Check the servers that generate: whether they answer, and whether they can serve the policies that respond."""

import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dnpo.connection import Connection
from dnpo.errors import EngineError
from dnpo.generate import Sampling
from dnpo.generate.server import PART, Server
from dnpo.running.gate.finding import Finding

if TYPE_CHECKING:
    from dnpo.stages.plan import Iteration, Run
    from dnpo.store import Stage

LAUNCH = f"{PART}.launch='vllm serve {{policy}} --port {{port}}'"


def findings(run: "Run", iterations: "Sequence[Iteration]", todo: "Sequence[Stage]", ask: bool = True) -> list[Finding]:
    """Check the servers that the stages ``todo`` would ask; no finding without such servers.

    Args:
        ask: whether to ask a server for its models; otherwise only settings are checked.
    """
    found: list[Finding] = []
    asked = _servers(run, iterations, todo)
    for server, policies in asked:
        problem = server.key_problem
        if run.model.quantization is not None:
            text = (
                f"model.quantization={run.model.quantization}: adapters on quantised weights are not merged, so no "
                "server can be given this policy; sample in this process"
            )
            found.append(Finding("engine", "stop", text, "generate.engine=null"))
        elif problem is not None:
            found.append(Finding("engine", "stop", problem, f"{PART}.key_from, {PART}.headers"))
        elif server.launch is not None:
            found.append(_can_start(server))
        elif len(policies) > 1:
            found.append(_has_one_policy(server, policies))
        elif ask:
            found.append(_answers(server))
    keys = {stage.key for stage in todo}
    here = [
        str(plan.k)
        for plan, iteration in zip(run.plans, iterations[1:], strict=True)
        if isinstance(plan.rollout, Sampling) and plan.rollout.engine is None
        if iteration.responses is not None and iteration.responses.key in keys
    ]
    if run.generate.engine is not None and here:
        text = f"in iteration {', '.join(here)} training samples come from this process, not from the server"
        found.append(Finding("engine", "warn", text, "rollout.engine"))
    return found


def _servers(
    run: "Run", iterations: "Sequence[Iteration]", todo: "Sequence[Stage]"
) -> list[tuple[Server, dict[str, str]]]:
    """The servers that the stages ``todo`` ask. Each has its policies: titles of the stages that made them, by key."""
    keys = {stage.key for stage in todo}
    asking: list[tuple[Sampling, Stage]] = []
    for iteration in iterations:
        asking.append((run.generate, iteration.evaluation))
        rollout = run.plans[iteration.k].rollout if iteration.k >= 0 else None
        if iteration.responses is not None and isinstance(rollout, Sampling):
            asking.append((rollout, iteration.responses))
    found: list[tuple[Server, dict[str, str]]] = []
    for sampling, stage in asking:
        if sampling.engine is None or stage.key not in keys:
            continue
        policies = next((policies for server, policies in found if server == sampling.engine), None)
        if policies is None:
            policies = {}
            found.append((sampling.engine, policies))
        policy = stage.inputs.get("policy")
        policies["" if policy is None else policy.key] = "the base model" if policy is None else policy.title
    return found


def _can_start(server: Server) -> Finding:
    program = server.command("", 0)[0]
    if shutil.which(program) is None:
        text = f"{PART}.launch: there is no program {program}; give its path, such as the one in a separate environment"
        return Finding("engine", "stop", text, f"{PART}.launch")
    return Finding("engine", "pass", f"each stage that samples starts {program} with its policy")


def _has_one_policy(server: Server, policies: "dict[str, str]") -> Finding:
    text = (
        f"{PART}.base_url={server.base_url}: that server has one policy, but {len(policies)} respond in the stages "
        f"to be computed ({', '.join(policies.values())}); a server that the run starts gets each of them"
    )
    return Finding("engine", "stop", text, LAUNCH)


def _answers(server: Server) -> Finding:
    from dnpo.generate.server.contact import find_model

    assert server.base_url is not None, "Server has either"
    connection = Connection(server.base_url, server.key_from, headers=server.headers or {}, timeout=server.timeout)
    try:
        model = find_model(server, connection)
    except EngineError as error:
        return Finding("engine", "stop", str(error), f"{PART}.base_url")
    return Finding("engine", "pass", f"{model} at {server.base_url} answers")
