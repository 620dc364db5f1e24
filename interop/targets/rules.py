"""Rules shared by the tables of targets with `torch.nn.Linear` layers.

Their weights are (out, in): every kernel is transposed. A `Layout` says how a target names the
parts of a block; the functions turn names into rules.
"""

import dataclasses
from collections.abc import Iterable

from interop.mapping.ops import Concat, Tie, Transpose, Zeros
from interop.mapping.spec import ModelSpec
from interop.mapping.table import Rule, Tap, rule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """How a target names the parts of a block.

    Attributes:
      attn_norm, attn, cross_norm, cross, mlp_norm, up, down: its parts.
      projections: query, key and value in an attention; None where one matrix holds all three.
      demands_dense_bias, demands_norm_bias, demands_cross: whether the target has these tensors
        whatever the model; then they are zeros where the model has none.
    """

    attn_norm: str = "norm1"
    attn: str = "self_attn"
    cross_norm: str = "norm2"
    cross: str = "multihead_attn"
    mlp_norm: str = "norm2"
    up: str = "linear1"
    down: str = "linear2"
    projections: tuple[str, str, str] | None = None
    demands_dense_bias: bool = False
    demands_norm_bias: bool = False
    demands_cross: bool = False

    def norm(self, source: str, target: str, spec: ModelSpec, has_bias: bool) -> list[Rule]:
        """Returns the rules of a layer norm."""
        rules = [rule(f"{source}.scale", f"{target}.weight")]
        if has_bias:
            rules.append(rule(f"{source}.bias", f"{target}.bias"))
        elif self.demands_norm_bias:
            like = f"{source}.scale"
            rules.append(rule((), f"{target}.bias", Zeros((spec.d_model,)), like=like))
        return rules

    def linear(
        self, sources: str | list[str], weight: str, bias: str, width: int, has_bias: bool
    ) -> list[Rule]:
        """Returns the rules of a dense layer; several sources are joined along its outputs."""
        names = [sources] if isinstance(sources, str) else sources
        is_joined = len(names) > 1
        kernels = [f"{name}.kernel" for name in names]
        rules = [rule(kernels, weight, *((Concat(1),) if is_joined else ()), Transpose())]
        if has_bias:
            biases = [f"{name}.bias" for name in names]
            rules.append(rule(biases, bias, *((Concat(0),) if is_joined else ())))
        elif self.demands_dense_bias:
            rules.append(rule((), bias, Zeros((width,)), like=kernels[0]))
        return rules

    def attention(self, source: str, target: str, spec: ModelSpec) -> list[Rule]:
        """Returns the rules of an attention."""
        d = spec.d_model
        names = [f"{source}.{name}" for name in ("query", "key", "value")]
        if self.projections is None:
            fused = f"{target}.in_proj_weight", f"{target}.in_proj_bias"
            rules = self.linear(names, *fused, 3 * d, spec.bias)
        else:
            rules = [
                one
                for name, theirs in zip(names, self.projections, strict=True)
                for one in self._dense(name, f"{target}.{theirs}", d, spec.bias)
            ]
        return rules + self._dense(f"{source}.out", f"{target}.out_proj", d, spec.bias)

    def block(self, ours: str, theirs: str, spec: ModelSpec, *, has_cross: bool) -> list[Rule]:
        """Returns the rules of a block, whose names begin with `ours` and `theirs`."""

        def norm(source: str, target: str) -> list[Rule]:
            return self.norm(f"{ours}{source}", f"{theirs}{target}", spec, spec.has_norm_bias)

        rules = norm("attn_norm", self.attn_norm)
        rules += self.attention(f"{ours}attn", f"{theirs}{self.attn}", spec)
        if has_cross:
            rules += norm("cross_norm", self.cross_norm)
            rules += self.attention(f"{ours}cross", f"{theirs}{self.cross}", spec)
        elif self.demands_cross:
            rules += self._no_cross(ours, theirs, spec)
        rules += norm("mlp_norm", self.mlp_norm)
        rules += self._dense(f"{ours}mlp.up", f"{theirs}{self.up}", spec.d_ff, spec.bias)
        return rules + self._dense(
            f"{ours}mlp.down", f"{theirs}{self.down}", spec.d_model, spec.bias
        )

    def taps(self, ours: str, theirs: str, *, has_cross: bool) -> list[Tap]:
        """Returns the places of a block where both can be looked into."""
        pairs = [
            ("attn_norm", self.attn_norm, "epsilon, weight or bias of the norm, or its place"),
            ("attn", self.attn, "the heads, the order of q, k, v, or out_proj"),
        ]
        if has_cross:
            pairs.append(("cross", self.cross, "the memory, or the weights of cross-attention"))
        pairs += [
            ("mlp_norm", self.mlp_norm, "epsilon, weight or bias of the norm, or its place"),
            ("mlp", self.down, f"the activation, {self.up}, {self.down}"),
        ]
        return [Tap(f"{ours}{a}", f"{theirs}{b}", causes) for a, b, causes in pairs]

    def _dense(self, source: str, target: str, width: int, has_bias: bool) -> list[Rule]:
        return self.linear(source, f"{target}.weight", f"{target}.bias", width, has_bias)

    def _no_cross(self, ours: str, theirs: str, spec: ModelSpec) -> list[Rule]:
        """Cross-attention that adds nothing, for a model that has none."""
        d, like = spec.d_model, f"{ours}attn_norm.scale"
        shapes = {
            f"{self.cross_norm}.weight": (d,),
            f"{self.cross}.in_proj_weight": (3 * d, d),
            f"{self.cross}.out_proj.weight": (d, d),
        }
        if spec.has_norm_bias:
            shapes[f"{self.cross_norm}.bias"] = (d,)
        if spec.bias:
            shapes[f"{self.cross}.in_proj_bias"] = (3 * d,)
            shapes[f"{self.cross}.out_proj.bias"] = (d,)
        return [
            rule((), f"{theirs}{name}", Zeros(shape), like=like) for name, shape in shapes.items()
        ]


def positions(spec: ModelSpec, ours: str = "position_embedding") -> str:
    """Returns the leaf that holds a table of positions."""
    return f"{ours}.{'constant' if spec.positions == 'sinusoidal' else 'embedding'}"


def head(
    spec: ModelSpec,
    table: str,
    embedding: str | Iterable[str],
    target: str,
    *,
    repeats_tied: bool = True,
) -> list[Rule]:
    """Returns the rules of an embedding and of the head, which may be one.

    Args:
      spec: says whether they are.
      table: the leaf of the embedding.
      embedding: the tensors that hold it.
      target: the head's module.
      repeats_tied: whether files name a tied head a second time.
    """
    names = (embedding,) if isinstance(embedding, str) else tuple(embedding)
    if spec.tie_embeddings and repeats_tied:
        names = (*names, f"{target}.weight")
    rules = [rule(table, names, *((Tie(len(names)),) if len(names) > 1 else ()))]
    if not spec.tie_embeddings:
        rules.append(rule("head.embedding", f"{target}.weight"))
    if spec.head_bias:
        rules.append(rule("head.bias", f"{target}.bias"))
    return rules
