"""A policy whose weights are divided among processes (FSDP2): each has a part, and gathers a block when it needs it.

Gradients are averaged over the processes, not summed.
"""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from dnpo.policy.model import Policy


def shard(policy: "Policy", mesh: "DeviceMesh") -> None:
    """Divide a policy's weights among the processes of a mesh. Before, every process has all of them.

    Blocks and body gather their weights in their forward pass. The head has no forward pass: its weights are read by
    :func:`gather_weight`.
    """
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    model = policy.causal_lm
    body, head = model.base_model, model.get_output_embeddings()
    tied = head.weight is model.get_input_embeddings().weight
    blocks = set(getattr(model, "_no_split_modules", None) or ())
    for module in [each for each in body.modules() if type(each).__name__ in blocks]:
        fully_shard(module, mesh=mesh)
    fully_shard(body, mesh=mesh, reshard_after_forward=True)
    if tied:
        head.weight = model.get_input_embeddings().weight
    for name, parameter in list(head.named_parameters(recurse=False)):
        if not is_part(parameter):
            part = distribute_tensor(parameter.detach(), mesh, [Shard(0)])
            setattr(head, name, nn.Parameter(part, requires_grad=parameter.requires_grad))


def is_part(tensor: Tensor) -> bool:
    """Whether this process has only a part of a tensor."""
    return hasattr(tensor, "full_tensor")  # a DTensor; importing its module would take long


def gather_weight(weight: Any) -> Tensor:
    """The whole of a weight divided among processes, with its gradient averaged over them; other weights unchanged."""
    if not is_part(weight):
        return weight  # type: ignore[no-any-return]
    from torch.distributed.tensor import Partial

    whole: Tensor = weight.full_tensor(grad_placements=[Partial("avg")])
    return whole


def is_sharded(model: nn.Module) -> bool:
    """Whether this process has only parts of a model's weights."""
    return any(map(is_part, model.parameters()))


def gather_state(model: nn.Module, *, trained: bool) -> dict[str, Any]:
    """All weights of a model, on the CPU of rank 0; every process must call this.

    Args:
        trained: return only trained weights.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained)
    return get_model_state_dict(model, options=options)
