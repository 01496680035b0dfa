"""Many processes of one run, one per device, as `torchrun` starts them.

Every rank holds the same student, takes its contiguous part of each step's global batch, and has a part in the loss of
the gathered outputs (`distill.gather`, `objectives.blocks`), so that a run is the same function of its recipe whatever
the number of ranks, dropout and drop-path included (`distill.dropout`). What is not so: batch norm (each rank
normalises by its own rows, unless `train.sync_batchnorm`).

Gradients are averaged in one all-reduce per dtype after the backward, and not by torch's DistributedDataParallel: that
one hooks into the backward and must know beforehand which parameters get a gradient, in which order and from how many
forwards, and here freezing schedules, ranks without a captioned row, several forwards in a step and accumulation all
change that. What it would gain, overlap with the backward, is little for students of a few million parameters.
"""

from __future__ import annotations

import os
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pocketvlm.data.splits import stable_hash
from pocketvlm.distill.masking import NORMS
from pocketvlm.edge.errors import IntegrityError, PocketvlmError, UsageError
from pocketvlm.teachers.device import pick_device

_T = TypeVar("_T")
# a step in which a rank is not heard of for so long will never end
STEP_TIMEOUT = timedelta(minutes=15)
# rank 0 may build a teacher cache, or evaluate, while the others wait
WORK_TIMEOUT = timedelta(days=7)


class RankError(PocketvlmError, RuntimeError):
    """Another rank of the run ended, or could not be reached."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run. rank: 0 is the one that writes files and speaks. count: of all.

    control: process group for what does not concern the device: decisions, waiting, objects (gloo, long timeout).
    """

    rank: int = 0
    count: int = 1
    control: Any = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def place(self) -> tuple[int, int]:
        """(rank, number of ranks)."""
        return self.rank, self.count

    def part(self, size: int) -> slice:
        """This rank's contiguous part of `size` rows; parts differ by at most one row, and together are all."""
        return slice(size * self.rank // self.count, size * (self.rank + 1) // self.count)

    def check_batches(self, pictures: int, texts: int) -> None:
        """Refuse a global batch of which some rank would get no row.

        Raises:
            UsageError: fewer pictures, or fewer texts (but some), than ranks.
        """
        for key, size in (("train.batch_size", pictures), ("train.text_batch", texts)):
            if 0 < size < self.count:
                raise UsageError(
                    f"a step has {size} rows ({key} is the global batch, at most the data) and the run has "
                    f"{self.count} ranks, so some would have nothing to do; raise {key}, or start fewer processes"
                )

    def seed(self, seed: int, step: int) -> None:
        """Seed torch's generators, for what is not keyed by sample; one rank alone keeps its one stream."""
        if self.count > 1:
            torch.manual_seed(stable_hash(f"rank/{seed}/{step}/{self.rank}") % 2**63)

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Of each flag, whether it is set on some rank; one small collective for all of them."""
        if self.count == 1:
            return flags
        found = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.control)
        return tuple(bool(flag) for flag in found)

    def wait(self) -> None:
        """Until all ranks are here, however long rank 0 works."""
        self.any(False)

    def from_first(self, make: Callable[[], _T]) -> _T:
        """What rank 0 makes, on every rank; only rank 0 calls `make`.

        Raises:
            RankError: on the others, where it failed on rank 0.
        """
        if self.count == 1:
            return make()
        box: list[Any] = [None, None]
        try:
            if self.first:
                box[0] = make()
        except BaseException as error:
            box[1] = str(error) or type(error).__name__
            raise
        finally:
            dist.broadcast_object_list(box, src=0, group=self.control)
        if box[1] is not None:
            raise RankError(f"rank 0 stopped, and all other ranks with it: {box[1]}")
        return box[0]

    def all_of(self, value: _T) -> list[_T]:
        """What every rank has, in the order of ranks, on every rank."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value, group=self.control)
        return found

    @contextmanager
    def first_before_others(self) -> Iterator[None]:
        """Rank 0 does the body, and then the others, who find ready what it wrote into shared folders.

        Raises:
            RankError: on the others, where it failed on rank 0.
        """
        if self.first:
            try:
                yield
            except BaseException as error:
                why = str(error) or type(error).__name__
                self.from_first(lambda: why)
                raise
            self.from_first(lambda: None)
            return
        why_not = self.from_first(lambda: None)
        if why_not is not None:
            raise RankError(f"rank 0 stopped, and all other ranks with it: {why_not}")
        yield

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace each gradient by its mean over ranks; one all-reduce per dtype.

        A parameter without a gradient on some ranks counts as zeros there, and one without on all ranks keeps None.
        Which parameters take part (`requires_grad`) must be the same on every rank.
        """
        if self.count == 1:
            return
        groups: dict[torch.dtype, list[nn.Parameter]] = {}
        for parameter in parameters:
            if parameter.requires_grad:
                groups.setdefault(parameter.dtype, []).append(parameter)
        for members in groups.values():
            like = members[0]
            has = like.new_tensor([float(parameter.grad is not None) for parameter in members])
            rows = [p.new_zeros(p.numel()) if p.grad is None else p.grad.reshape(-1) for p in members]
            flat = torch.cat([has, *rows])
            dist.all_reduce(flat)
            found, *parts = flat.split([len(members), *(parameter.numel() for parameter in members)])
            flat[len(members) :] /= self.count
            for parameter, part, count in zip(members, parts, found.tolist()):
                parameter.grad = part.view_as(parameter) if count else None

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over ranks."""
        if self.count == 1:
            return value
        value = value.clone()
        dist.all_reduce(value)
        return value / self.count

    @torch.no_grad()
    def average_statistics(self, module: nn.Module) -> None:
        """Replace the running statistics of batch norms in training mode by their mean over ranks.

        The mean of the ranks' variances leaves out how far their means lie apart.
        """
        if self.count == 1:
            return
        norms = [m for m in module.modules() if isinstance(m, NORMS) and m.training and m.running_mean is not None]
        found = [value for norm in norms for value in (norm.running_mean, norm.running_var) if value is not None]
        if not found:
            return
        flat = torch.cat([value.reshape(-1) for value in found])
        dist.all_reduce(flat)
        parts = (flat / self.count).split([value.numel() for value in found])
        torch._foreach_copy_(found, [part.view_as(value) for part, value in zip(parts, found)])

    def synchronised(self, student: nn.Module, device: torch.device) -> Any:
        """The student with batch norms that normalise by the rows of all ranks; one rank alone has nothing to do.

        Raises:
            UsageError: several ranks on a device for which torch has no such batch norm.
        """
        if self.count == 1:
            return student
        if device.type != "cuda":
            raise UsageError(
                f"train.sync_batchnorm was asked for on {device.type}, and torch has it for CUDA only, so the ranks "
                "would normalise apart; leave it out, hold the statistics (train.hold_statistics), or train on CUDA"
            )
        from timm.layers import convert_sync_batchnorm

        return convert_sync_batchnorm(student)  # torch's own would lose the activations inside timm's norms

    @torch.no_grad()
    def share(self, *modules: nn.Module) -> None:
        """Give every rank the state that rank 0 has."""
        if self.count == 1:
            return
        for module in modules:
            for value in module.state_dict().values():
                whole = value.contiguous()
                dist.broadcast(whole, src=0)
                value.copy_(whole)

    def check_equal(self, **modules: nn.Module) -> None:
        """Compare the checksums of every parameter and buffer over ranks.

        Raises:
            IntegrityError: some rank holds other numbers than rank 0; names the first tensor that differs.
        """
        if self.count == 1:
            return
        state = {
            f"{key}.{name}": value for key, module in modules.items() for name, value in module.state_dict().items()
        }
        own = torch.tensor([_checksum(value) for value in state.values()], dtype=torch.int64)
        found = [torch.empty_like(own) for _ in range(self.count)]
        dist.all_gather(found, own, group=self.control)
        for rank, other in enumerate(found):
            if not torch.equal(other, found[0]):
                name = list(state)[int((other != found[0]).nonzero()[0])]
                raise IntegrityError(
                    f"{name} on rank {rank} is not what it is on rank 0, so the ranks train different students and no "
                    "checkpoint was written; continue from the last one with --resume, on ranks of one kind and release"
                )


ALONE = Ranks()


@contextmanager
def joined_ranks(device: str) -> Iterator[Ranks]:
    """The ranks of this run, by the environment that torchrun sets; `ALONE` without it.

    device: the recipe's; on CUDA the ranks speak NCCL, elsewhere gloo.

    Raises:
        UsageError: an environment, or a device, that several ranks cannot use. RankError: a rank was lost.
    """
    count = _from_environment("WORLD_SIZE", "1")
    if count == 1:
        yield ALONE
        return
    rank = _from_environment("RANK", "")
    if ":" in device:
        raise UsageError(
            f"train.device is {device!r} and the run has {count} ranks, which would all use that one; set it to "
            "'cuda' or 'auto', which give every rank a device of its own"
        )
    own = pick_device(device)
    cuda = own.type == "cuda"
    try:
        if cuda:
            torch.cuda.set_device(own)
        how: dict[str, Any] = {"device_id": own} if cuda else {}
        store = _meeting(rank, count)
        dist.init_process_group(
            "nccl" if cuda else "gloo", store=store, rank=rank, world_size=count, timeout=STEP_TIMEOUT, **how
        )
        yield Ranks(rank, count, dist.new_group(backend="gloo", timeout=WORK_TIMEOUT))
    except (dist.DistError, RuntimeError) as error:
        if isinstance(error, PocketvlmError) or not _lost(error):
            raise
        raise RankError(
            f"rank {rank} of {count} lost the others ({str(error).splitlines()[0]}), so the run stopped; see what the "
            "first rank that failed says, and continue with --resume"
        ) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _meeting(rank: int, count: int) -> dist.Store:
    """A store for the processes of this start alone.

    torchrun keeps one for all of its starts, in which the addresses of processes that are gone lie under the names that
    the next ones use: these would call the dead until their time is up. No number says which start this is (restarts
    are counted by each node for itself), so rank 0 gives it a name, and each other rank takes it by a word of its own.

    Raises:
        RankError: some rank did not come.
    """
    store = next(dist.rendezvous("env://", timeout=STEP_TIMEOUT))[0]
    own = uuid.uuid4().hex
    store.set(f"pocketvlm/hello/{rank}", own)
    if rank:
        own = store.get(f"pocketvlm/answer/{own}").decode()
        store.set(f"pocketvlm/heard/{own}/{rank}", "")
        return dist.PrefixStore(own, store)
    missing, began = set(range(1, count)), time.monotonic()
    while missing:
        for other in sorted(missing):
            if store.check([f"pocketvlm/heard/{own}/{other}"]):
                missing.discard(other)
            elif store.check([f"pocketvlm/hello/{other}"]):
                # perhaps of a process before, whom this does not reach
                store.set(f"pocketvlm/answer/{store.get(f'pocketvlm/hello/{other}').decode()}", own)
        if missing and time.monotonic() - began > STEP_TIMEOUT.total_seconds():
            raise RankError(
                f"ranks {sorted(missing)} of {count} did not come in {STEP_TIMEOUT}, so the run did not start; "
                "see what they say, and start it again with --resume"
            )
        time.sleep(0.02)
    return dist.PrefixStore(own, store)


def restarted() -> bool:
    """Whether torchrun started this process again after a failure."""
    return _from_environment("TORCHELASTIC_RESTART_COUNT", "0") > 0


def _from_environment(name: str, default: str) -> int:
    value = os.environ.get(name, default)
    if not value.isdigit():
        raise UsageError(
            f"the environment variable {name} is {value!r} where a number is needed, so this process does not know its "
            "place among the ranks; start the run by torchrun, or unset WORLD_SIZE"
        )
    return int(value)


def _lost(error: BaseException) -> bool:
    """Whether this is how torch says that another process is gone, and not an error of this one."""
    signs = ("gloo", "Connection closed", "Connection reset", "NCCL", "Timed out", "Socket", "store")
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in signs)


def _checksum(value: Tensor) -> int:
    return zlib.crc32(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
