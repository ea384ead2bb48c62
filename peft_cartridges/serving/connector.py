"""The KV connector: how a stock vLLM engine takes a cartridge from the store into its paged cache.

The only file that touches vLLM's KV-connector interface, which vLLM calls experimental; written and tested against
the releases in `TESTED`. The scheduler half tells vLLM that a request's first tokens are computed already; the worker
half writes their keys and values, through the attention back end's own cache update, into the blocks that vLLM
allotted, before the step that first reads them. After that they are tokens like any other: vLLM shares, evicts and,
after a preemption, asks for them again.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import torch
import vllm
from packaging.version import Version
from torch import Tensor
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index

from .store import CartridgeStore, StoredCartridge

logger = init_logger(f"vllm.{__name__}")

TESTED = ("0.32", "0.33")  # from, up to but not including
_BELOW, _ABOVE = (Version(bound) for bound in TESTED)
_VERSION = Version(Version(vllm.__version__).base_version)
if _VERSION < _BELOW:
    raise ImportError(
        f"Cartridges need vLLM {TESTED[0]} or newer, and this is {vllm.__version__}: pip install 'vllm>={TESTED[0]}'."
    )
if _VERSION >= _ABOVE:
    logger.warning(
        "Cartridges were tested with vLLM %s, not with %s, and its connector interface changes: compare some answers "
        "with transformers before you rely on them.",
        TESTED[0],
        vllm.__version__,
    )

# What a request carries: SamplingParams.extra_args["kv_transfer_params"] = {CARTRIDGE: digest}.
CARTRIDGE = "cartridge"


@dataclass
class _Load:
    """Tokens `start … stop - 1` of a cartridge go into these blocks; `error` says why they must not."""

    digest: str
    start: int
    stop: int
    block_ids: list[int]
    error: str | None = None


@dataclass
class _Loads(KVConnectorMetadata):
    loads: list[_Load] = field(default_factory=list)


class CartridgeConnector(KVConnectorBase_V1):
    """Serves cartridges from a store. `kv_connector_extra_config` has:

    - `store`: the folder of the `CartridgeStore`;
    - `placeholders`: the alphabet of `StoredCartridge.placeholder_ids`;
    - `host_bytes`: how many bytes of cartridges each worker keeps in host memory (least recently used go first).

    A request whose cartridge is unknown, damaged or does not match its prompt fails; the engine goes on.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        extra = self._kv_transfer_config.kv_connector_extra_config
        self._store = CartridgeStore(extra["store"])
        if len(kv_cache_config.kv_cache_groups) != 1:
            raise ValueError(
                "This model keeps more than one kind of cache (recurrent or convolutional layers beside attention): "
                "cartridges on vLLM need one kind. Serve it with --engine transformers."
            )
        self._block_size = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        # scheduler half
        self._alphabet = [int(letter) for letter in extra["placeholders"]]
        self._known: dict[str, StoredCartridge] = {}
        self._plans: dict[str, _Load] = {}
        self._loads: list[_Load] = []
        # worker half
        self._host = _HostMemory(int(extra.get("host_bytes", 4 << 30)))
        self._layers: dict[int, Any] = {}
        self._failed_blocks: set[int] = set()
        self._stats = CartridgeStats()

    @property
    def requires_kv_delivery(self) -> bool:
        return False

    # -- scheduler half ----------------------------------------------------------------------------------------------

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        digest = (request.kv_transfer_params or {}).get(CARTRIDGE)
        if digest is None:
            return 0, False
        # vLLM takes nothing from a connector where a request shuns the prefix cache (it wants the prompt's own
        # log-probabilities, say). A cartridge is no cached copy of something: there is nothing else to compute it from.
        request.skip_reading_prefix_cache = False
        last = request.num_tokens - 1  # one token at least must be computed, for its logits
        try:
            stop = self._check(digest, request)
            error = None
        except (ValueError, OSError) as found:
            error = str(found)
            stop = min(last, num_computed_tokens + self._block_size)
            logger.error("Request %s fails: %s", request.request_id, error)
        self._plans[request.request_id] = _Load(digest, num_computed_tokens, stop, [], error)
        return max(0, stop - num_computed_tokens), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        plan = self._plans.pop(request.request_id, None)
        if plan is not None and num_external_tokens > 0:
            plan.block_ids = list(blocks.get_block_ids()[0])
            self._loads.append(plan)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        loads, self._loads = _Loads(self._loads), []
        return loads

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        self._plans.pop(request.request_id, None)
        return False, None

    def _check(self, digest: str, request: Any) -> int:
        if digest not in self._known:
            self._known[digest] = self._store.get(digest)
        stored = self._known[digest]
        # Also keeps keys and values of a cartridge from being cached as those of some ordinary text.
        if request.prompt_token_ids[: stored.num_tokens] != stored.placeholder_ids(self._alphabet):
            raise ValueError(f"its prompt does not begin with the placeholders of cartridge {digest[:12]}")
        if request.num_tokens <= stored.num_tokens:
            raise ValueError("its prompt has nothing behind the cartridge")
        return stored.num_tokens

    # -- worker half -------------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, Tensor]) -> None:
        context = self._vllm_config.compilation_config.static_forward_context
        for name in kv_caches:
            layer = context[name]
            if not hasattr(getattr(layer, "impl", None), "do_kv_cache_update") or hasattr(layer, "kv_lora_rank"):
                raise ValueError(
                    f"Layer {name} ({type(layer).__name__}, {type(getattr(layer, 'impl', None)).__name__}) keeps no "
                    "keys and values that could be written: cartridges cannot be served on this model with this "
                    "attention back end. Choose another with VLLM_ATTENTION_BACKEND, or --engine transformers."
                )
            if getattr(layer, "kv_sharing_target_layer_name", None) is None:
                self._layers[extract_layer_index(name)] = layer

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, _Loads)
        for load in metadata.loads:
            try:
                if load.error is not None:
                    raise ValueError(load.error)
                self._write(load)
            except (ValueError, OSError, RuntimeError) as error:
                logger.error("Cartridge %s could not be loaded: %s", load.digest[:12], error)
                first = load.start // self._block_size
                self._failed_blocks.update(load.block_ids[first : -(-load.stop // self._block_size)])
                self._stats.add(failures=1)

    def get_block_ids_with_load_errors(self) -> set[int]:
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def _write(self, load: _Load) -> None:
        started = time.perf_counter()
        tensors = self._host.get(load.digest)
        missed = tensors is None
        if tensors is None:
            tensors = self._read(load.digest)
            evicted = self._host.put(load.digest, tensors)
            self._stats.add(host_evictions=evicted)
        blocks = torch.tensor(load.block_ids)
        tokens = torch.arange(load.start, load.stop)
        slots = blocks[tokens // self._block_size] * self._block_size + tokens % self._block_size
        moved = 0
        for index, (key, value) in tensors.items():
            layer = self._layers[index]
            cache = layer.kv_cache
            parts = [
                part[load.start : load.stop].to(cache.device, non_blocking=True).contiguous() for part in (key, value)
            ]
            slots = slots.to(cache.device, non_blocking=True)
            layer.impl.do_kv_cache_update(layer, *parts, cache, slots)
            moved += sum(part.numel() * part.element_size() for part in parts)
        self._stats.add(
            loads=1,
            host_misses=int(missed),
            load_tokens=load.stop - load.start,
            load_bytes=moved,
            load_seconds=time.perf_counter() - started,
        )
        self._stats.data["host_bytes"] = self._host.nbytes

    def _read(self, digest: str) -> dict[int, tuple[Tensor, Tensor]]:
        """This rank's layers and heads, in the dtype that the model computes in."""
        stored = self._store.get(digest)
        mine = sorted(set(stored.layers) & set(self._layers))
        if len(stored.layers) < len(self._layers) or len(mine) < len(self._layers):
            raise ValueError(
                f"it has layers {stored.layers[0]} to {stored.layers[-1]}, the model has others: it belongs to another "
                "base model"
            )
        tensors = self._store.read_layers(
            digest,
            mine,
            rank=get_tensor_model_parallel_rank(),
            world_size=get_tensor_model_parallel_world_size(),
        )
        dtype, pinned = self._vllm_config.model_config.dtype, torch.cuda.is_available()
        for index, (key, value) in tensors.items():
            layer = self._layers[index]
            want = [(layer.num_kv_heads, layer.head_size), (layer.num_kv_heads, layer.head_size_v)]
            have = [tuple(part.shape[1:]) for part in (key, value)]
            if have != want:
                raise ValueError(
                    f"its layer {index} has keys and values of (heads, dim) {have}, the model's {want}: it belongs to "
                    "another base model"
                )
            parts = (part.to(dtype) for part in (key, value))
            key, value = (part.pin_memory() if pinned else part for part in parts)
            tensors[index] = (key, value)
        return tensors

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: `start_load_kv` queues its copies in front of the step that reads them."""

    def save_kv_layer(self, layer_name: str, kv_layer: Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is ever taken out of the engine."""

    def wait_for_save(self) -> None: ...

    # -- metrics -----------------------------------------------------------------------------------------------------

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        if self._stats.is_empty():
            return None
        stats, self._stats = self._stats, CartridgeStats()
        return stats

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats:
        return CartridgeStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: dict[int, list[object]]
    ) -> KVConnectorPromMetrics:
        return _Prometheus(vllm_config, metric_types, labelnames, per_engine_labelvalues)


class _HostMemory:
    """Cartridges in host memory, least recently used ones dropped beyond `max_bytes`."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.nbytes = max_bytes, 0
        self._held: OrderedDict[str, dict[int, tuple[Tensor, Tensor]]] = OrderedDict()

    def get(self, digest: str) -> dict[int, tuple[Tensor, Tensor]] | None:
        if digest in self._held:
            self._held.move_to_end(digest)
        return self._held.get(digest)

    def put(self, digest: str, tensors: dict[int, tuple[Tensor, Tensor]]) -> int:
        """How many others had to go. A cartridge larger than the whole limit is not kept."""
        size, evicted = self._size(tensors), 0
        if size > self.max_bytes:
            return 0
        while self.nbytes + size > self.max_bytes:
            _, dropped = self._held.popitem(last=False)
            self.nbytes -= self._size(dropped)
            evicted += 1
        self._held[digest] = tensors
        self.nbytes += size
        return evicted

    @staticmethod
    def _size(tensors: dict[int, tuple[Tensor, Tensor]]) -> int:
        return sum(part.numel() * part.element_size() for pair in tensors.values() for part in pair)


# Name -> what it counts. Summed over workers, but for `host_bytes`, the size of the fullest one.
_COUNTED = {
    "loads": "Cartridges written into the engine's cache (its prefix cache did not hold them).",
    "load_tokens": "Tokens of these.",
    "load_bytes": "Bytes of these.",
    "load_seconds": "Seconds that these took, reading from disk included.",
    "host_misses": "Loads that had to read from disk.",
    "host_evictions": "Cartridges dropped from host memory to make room.",
    "failures": "Requests whose cartridge could not be loaded.",
}


@dataclass
class CartridgeStats(KVConnectorStats):
    """What the connector did since it was last asked."""

    data: dict[str, Any] = field(default_factory=dict)

    def add(self, **counts: float) -> None:
        for name, count in counts.items():
            self.data[name] = self.data.get(name, 0) + count

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        self.add(**{name: count for name, count in other.data.items() if name in _COUNTED})
        self.data["host_bytes"] = max(self.data.get("host_bytes", 0), other.data.get("host_bytes", 0))
        return self

    def reduce(self) -> dict[str, int | float]:
        return dict(self.data)

    def is_empty(self) -> bool:
        return not any(self.data.values())


class _Prometheus(KVConnectorPromMetrics):
    """`vllm:cartridge_loads_total` and so on, at the server's `/metrics` (vLLM's prefix: it clears its own names)."""

    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: list[str], labels: dict[int, list[object]]):
        super().__init__(vllm_config, metric_types, labelnames, labels)
        self._counters = {
            name: self._counter_cls(name=f"vllm:cartridge_{name}", documentation=text, labelnames=labelnames)
            for name, text in _COUNTED.items()
        }
        self._host_bytes = self._gauge_cls(
            name="vllm:cartridge_host_bytes",
            documentation="Bytes of cartridges in host memory.",
            labelnames=labelnames,
        )

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        labels = self.per_engine_labelvalues[engine_idx]
        for name, counter in self._counters.items():
            counter.labels(*labels).inc(transfer_stats_data.get(name, 0))
        if "host_bytes" in transfer_stats_data:
            self._host_bytes.labels(*labels).set(transfer_stats_data["host_bytes"])
