"""Drawing codes from a prior, and asking it how likely codes are: `sample_codes` and `score`.

Axis letters: B batch, A grid axes, T input tokens, P code positions, K entries of a stream, M width.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from vqtok.codes import Codes
from vqtok.fingerprint import check_fingerprint
from vqtok.modeling import evaluating

from .checks import at_least_one, check_codes, check_guidance, condition_rows, size_rows
from .fast import decoder_for
from .sampling import CodeScores, SamplingSettings, checked_seed, draw, guide, uniforms
from .sequence import order_table, pad_conditions, unflatten

Condition = Sequence[Sequence[int] | None] | Sequence[int | None] | None


class CodeDrawingMixin:
    """What every prior over codes can do; the model supplies the network."""

    @torch.no_grad()
    def sample_codes(
        self,
        condition: Condition = None,
        sizes: Sequence[int] | Sequence[Sequence[int]] | None = None,
        num_samples: int = 1,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        batch_size: int = 64,
    ) -> Codes:
        """Return drawn codes: `num_samples` for the first condition, then for the second, and so on.

        Sample i draws from a generator keyed by (seed, i) and does not depend on the batch it was drawn in. Guidance runs both
        halves in one batch with one cache. What is None is read from `generation_config`; see `SamplingSettings` for the order.

        Args:
            condition: a list of lists of text tokens, or of class labels; None, as a whole or as an entry, is the null condition.
            sizes: `(ndim,)` in pixels, samples or bytes for all, or a list with one per condition; None draws the coarsest grid too,
                and sizes are then whole multiples of the largest stride.
            num_samples: samples per condition, at least 1.
            guidance_scale: at least 0; 1 is no guidance.
            temperature: at least 0; 0 takes the likeliest code.
            top_k: at least 1.
            top_p: in (0, 1].
            seed: at least 0; None draws one from torch's global generator.
            batch_size: how many samples are drawn together; changes speed and memory only.

        Returns:
            `Codes` of the prior's code space, on its device.

        Raises:
            ValueError: a value out of its range, a condition or size the prior does not know, guidance without a null condition.
        """
        given = {"guidance_scale": guidance_scale, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        settings, seed = SamplingSettings.resolve(self.generation_config, **given), checked_seed(seed)
        check_guidance(settings.guidance_scale, self.config)
        num_samples, batch_size = at_least_one(num_samples, "num_samples"), at_least_one(batch_size, "batch_size")
        rows = condition_rows(condition, self.config)
        conditions = [row for row in rows for _ in range(num_samples)]
        parts, order = [], []
        with evaluating(self):
            if sizes is None:
                stride = self.vocabulary.layout.stride
                extents = [
                    self._draw_grids(conditions, part, settings, seed)
                    for part in grouped([0] * len(conditions), batch_size)
                ]
                wanted = (stride * torch.cat(extents)).tolist()
            else:
                wanted = [size for size in size_rows(sizes, len(rows), self.config) for _ in range(num_samples)]
            for indices in grouped([self.vocabulary.layout.padded(size) for size in wanted], batch_size):
                parts.append(self._draw_codes(conditions, wanted, indices, settings, seed))
                order += indices
        return Codes.cat(parts)[torch.tensor(order).argsort().tolist()]

    def _draw_grids(
        self, conditions: list[list[int]], indices: list[int], settings: SamplingSettings, seed: int
    ) -> Tensor:
        """Extents `(B, A)` of the coarsest grid, for some of the samples."""
        axes = self.vocabulary.layout.ndim
        vectors_PM = self._place_vectors(self._shapes([(1,) * axes] * len(self.config.ratios)))[: 1 + axes]
        streams = [(self.vocabulary.size_offset, self.vocabulary.max_grid)] * axes
        numbers_BA = torch.stack([uniforms(seed, i, axes) for i in indices])
        drawn_BA = self._draw(
            [conditions[i] for i in indices], self._prefix(()), vectors_PM, streams, numbers_BA, settings
        )
        return 1 + drawn_BA.cpu()

    def _draw_codes(
        self,
        conditions: list[list[int]],
        sizes: list[list[int]],
        indices: list[int],
        settings: SamplingSettings,
        seed: int,
    ) -> Codes:
        """Codes of some of the samples, all of one grid."""
        layout = self.vocabulary.layout
        shapes = self._shapes(layout.grids(sizes[indices[0]]))
        table = order_table(shapes, self.config.order, self.device)
        streams = [self._streams[name] for name in zip(table.level_P.tolist(), table.codebook_P.tolist(), strict=True)]
        # The first numbers of a sample are for its size, whether it is drawn or given.
        numbers_BP = torch.stack([uniforms(seed, i, layout.ndim + len(table))[layout.ndim :] for i in indices])
        vectors_PM, prefix = self._place_vectors(shapes), self._prefix(shapes[0][1:])
        drawn_BP = self._draw([conditions[i] for i in indices], prefix, vectors_PM, streams, numbers_BP, settings)
        levels = self.vocabulary.merge(unflatten(drawn_BP, table))
        return Codes(levels, torch.tensor([sizes[i] for i in indices]), layout, self.config.fingerprint)

    def _draw(
        self,
        conditions: list[list[int]],
        prefix: Tensor,
        vectors_PM: Tensor,
        streams: list[tuple[int, int]],
        numbers_BP: Tensor,
        settings: SamplingSettings,
    ) -> Tensor:
        """Entries `(B, P)` of the streams (offset, size), one after another: a pass for the prompt, then one per token."""
        scale, null = settings.guidance_scale, [self.null_id]
        guided = scale != 1 and any(ids != null for ids in conditions)
        rows = [*conditions, *([null] * len(conditions) if guided else [])]
        ids_BL, mask_BL = (value.to(self.device) for value in pad_conditions(rows))
        is_padded = not bool(mask_BL.all())
        mask_BT = F.pad(mask_BL, (0, len(prefix) + len(streams)), value=True)
        # What the next pass reads: the prompt, then the token just drawn.
        tokens_BT, places_PM = torch.cat([ids_BL, prefix.expand(len(rows), -1)], 1), vectors_PM[: len(prefix)]
        seen, numbers_BP, drawn = tokens_BT.shape[1], numbers_BP.to(self.device), []
        start, length = self.config.prefix_length - ids_BL.shape[1], seen + len(streams) - 1
        self._check_length(start + length)
        decoder = decoder_for(self.backbone, len(rows), length, start)
        for step, (offset, size) in enumerate(streams):
            x_BTM = decoder(self._inputs(tokens_BT, places_PM), mask_BT[:, : seen + step] if is_padded else None)
            logits_BK = self._logits(x_BTM[:, -1], offset, size).float()
            if guided:
                logits_BK = guide(*logits_BK.chunk(2), scale)
            drawn.append(draw(logits_BK, numbers_BP[:, step], settings))
            tokens_BT = (drawn[-1] + offset).repeat(2 if guided else 1)[:, None]
            at = len(prefix) + step
            places_PM = vectors_PM[at : at + 1]
        if not bool(torch.isfinite(logits_BK).all()):  # not-a-number stays in the cache, so the last step shows it
            raise ValueError(
                "this prior gives logits that are not finite: its training diverged (train again with a lower learning rate), or its "
                f"weights overflow in {self.dtype} (load it with dtype float32)"
            )
        return torch.stack(drawn, 1)

    @torch.no_grad()
    def score(self, codes: Codes, condition: Condition = None, batch_size: int = 64) -> CodeScores:
        """Return how likely the prior finds codes, given their sizes and conditions.

        Args:
            codes: all levels and codebooks, of any sizes.
            condition: one entry per sample, as for `sample_codes`; None is the null condition for all.
            batch_size: how many samples are scored together; changes speed and memory only.

        Raises:
            ValueError: codes of another layout or code space (both are named), or conditions that do not fit.
        """
        layout = self.vocabulary.layout
        if codes.layout != layout:
            raise ValueError(
                f"these codes have the layout {codes.layout}, the prior was made for {layout}: use the tokenizer of the prior"
            )
        if self.config.fingerprint is not None and codes.fingerprint is not None:
            check_fingerprint(self.config.fingerprint, codes.fingerprint, "these codes")
        conditions = condition_rows(condition, self.config, len(codes))
        maps = [torch.zeros(level.shape, device=self.device) for level in codes.levels]
        sizes = codes.sizes.tolist()
        with evaluating(self):
            for indices in grouped([layout.padded(size) for size in sizes], at_least_one(batch_size, "batch_size")):
                part = codes[indices]
                check_codes(part.levels, part.sizes, self.config)
                padded = (value.to(self.device) for value in pad_conditions([conditions[i] for i in indices]))
                nats_BP, _, table = self._nats(part.levels, *padded)
                for level, nats in enumerate(unflatten(nats_BP, table)):
                    # -ln p of a factorised code is the sum over its factors.
                    nats = nats.unflatten(1, (layout.levels[level].num_codebooks, -1)).sum(2)
                    where = (torch.tensor(indices, device=self.device), slice(None), *map(slice, nats.shape[2:]))
                    maps[level][where] = nats
        per_level = [
            [
                level.num_codebooks * math.prod(grid)
                for level, grid in zip(layout.levels, layout.grids(size), strict=True)
            ]
            for size in sizes
        ]
        counts = torch.tensor(per_level, device=self.device)
        sums = torch.stack([nats.flatten(1).sum(1) for nats in maps], 1)
        units = torch.tensor([math.prod(size) for size in sizes], device=self.device)
        return CodeScores(sums.sum(1), sums / counts, tuple(maps), sums.sum(1) / math.log(2) / units)


def grouped(keys: Sequence[Hashable], batch_size: int) -> list[list[int]]:
    """Indices of equal keys together, in batches of at most `batch_size`.

    Example:
        >>> grouped(["a", "b", "a", "a"], 2)
        [[0, 2], [3], [1]]
    """
    groups: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    return [group[at : at + batch_size] for group in groups.values() for at in range(0, len(group), batch_size)]
