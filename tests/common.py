"""What every room's model has to show. A room's test class inherits `TokenizerTests` and says how to make its config and media.

class TestImageVQ(TokenizerTests):
    model_class = ImageVQModel
    config_fields = {"num_channels", ...}
    sizes = [(16, 16), (24, 40)]
    quantizer_terms = {"commitment_loss": 0.25}

    def make_config(self, **changes): return ImageVQConfig(**{**TINY, **changes})
    def make_media(self, batch, size, seed=0): return torch.randn(batch, 3, *size)
"""

import copy
import dataclasses
import json
import re
from collections.abc import Sequence

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.quantizing import check_differences, in_turn, level_quantizers, rows, searched
from vqtok.codes import Codes
from vqtok.configuration import VQConfig
from vqtok.modeling import VQPreTrainedModel
from vqtok.quantizers import (
    Codebook,
    GumbelQuantizer,
    HierarchicalQuantizer,
    ProductQuantizer,
    VectorQuantizer,
    full_precision,
)

PREPROCESSING = {"rescale": 1 / 255}
BOOKKEEPING = (".counts", ".updates", ".initialised")  # of the quantizer: what decides no codes


def state(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same_state(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Equal names, dtypes and bits."""
    return first.keys() == second.keys() and all(
        value.dtype == second[name].dtype and value.equal(second[name]) for name, value in first.items()
    )


def same(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Equal levels, bit for bit."""
    return len(first) == len(second) and all(a.equal(b) for a, b in zip(first, second, strict=True))


def deciding(tensors: dict[str, Tensor]) -> list[str]:
    """Names of the quantizer's tensors that decide codes or what they mean; there may be none."""
    return [name for name in tensors if name.startswith("quantizer.") and not name.endswith(BOOKKEEPING)]


@torch.no_grad()
def proposals(model: VQPreTrainedModel, media: Tensor) -> dict[int, Tensor]:
    """What the encoder gives to the quantizer, by the level that it is asked for: all of them, or level 0 for all."""
    given = {}

    def propose(level: int, quantized: Sequence[Tensor]) -> Tensor:
        given[level] = model.propose(features, level, quantized)
        return given[level]

    with full_precision(media.device.type):
        features = model.extract(model.check_media(media))
        model.quantizer.encode(propose)
    return given


class TokenizerTests:
    """Modality-blind: a size is what `CodeLayout.grids` takes, media are a tensor `(B, ...)`."""

    model_class: type[VQPreTrainedModel]
    config_fields: set[str]  # every field of the config beyond those of VQConfig: a change of the format is a decision
    sizes: Sequence[Sequence[int]]  # of padded media; a square or short one first, then odd grids and unequal sides
    # Terms of the loss with their weights: the room's, and those that the quantizer documents for training.
    media_terms: dict[str, float] = {"reconstruction_loss": 1.0}
    quantizer_terms: dict[str, float]

    def make_config(self, **changes) -> VQConfig:
        raise NotImplementedError

    def make_media(self, batch: int, size: Sequence[int], seed: int = 0) -> Tensor:
        raise NotImplementedError

    def output_shape(self, media: Tensor) -> tuple[int, ...]:
        """Of the reconstruction."""
        return tuple(media.shape)

    def make_model(self, **changes) -> VQPreTrainedModel:
        """A model in eval whose codebooks were initialised by data, so that its codes differ from place to place."""
        torch.manual_seed(0)
        model = self.model_class(self.make_config(**changes)).eval()
        model.init_codebooks([self.make_media(8, self.sizes[0], seed=100)])
        codes = model.encode(self.make_media(2, self.sizes[0])).codes
        assert all(level.unique().numel() > 2 for level in codes), "codes are all alike: the tests would show nothing"
        return model

    def test_codebooks_start_at_the_means_of_what_they_see(self):
        """The latents, or what the codebooks before left of them; one that is shared is another matter."""
        model, media = self.make_model(), self.make_media(8, self.sizes[0], seed=60)
        model.init_codebooks([media])
        levels = level_quantizers(model.quantizer)
        turns = [searched(*each) for each in zip(levels, model.encode(media).latents, strict=True)]
        leaves = [leaf for turn in turns for leaf, _ in turn]
        for leaf, z in (pair for turn in turns for pair in turn):
            if leaves.count(leaf) == 1 and isinstance(leaf, VectorQuantizer | GumbelQuantizer):
                own = isinstance(leaf, VectorQuantizer)
                found, metric = (leaf.codebook.table, leaf.config.metric) if own else (leaf.embedding, "euclidean")
                expected = Codebook(*found.shape, "gradient", metric)
                expected.initialise(z)
                assert found.equal(expected.table)

    def test_codebooks_start_from_media_of_any_sizes(self):
        model = self.make_model()
        before = state(model)
        model.init_codebooks([self.make_media(4, size, seed=50) for size in self.sizes])
        changed = {name for name, value in state(model).items() if not value.equal(before[name])}
        assert all(name.startswith("quantizer.") for name in changed)
        assert all(codebook.initialised for codebook in model.quantizer.codebooks)
        assert all(level.unique().numel() > 2 for level in model.encode(self.make_media(2, self.sizes[0])).codes)

    # -- configuration, saving, loading

    def test_config_fields_and_round_trip(self, tmp_path):
        base = {field.name for field in dataclasses.fields(VQConfig)}
        assert {field.name for field in dataclasses.fields(type(self.make_config()))} - base == self.config_fields
        config = self.make_config(fingerprint="f" * 64)
        config.save_pretrained(tmp_path)
        written = json.loads((tmp_path / "config.json").read_text())
        assert self.config_fields <= written.keys() and written["model_type"] == config.model_type
        back = type(config).from_pretrained(tmp_path)
        assert back.to_dict() == config.to_dict() and back.layout == config.layout and back.fingerprint == "f" * 64

    def test_save_and_load_are_bit_equal(self, tmp_path):
        model = self.make_model()
        model.train()(self.make_media(2, self.sizes[0]))
        model.update_codebooks()
        model.eval().save_pretrained(tmp_path)
        back = self.model_class.from_pretrained(tmp_path)
        assert not back.training and same_state(state(back), state(model))
        plain = [value for module in back.modules() for value in vars(module).values() if isinstance(value, Tensor)]
        assert not any(value.is_meta for value in plain), (
            "transformers builds on the meta device and fills only the state"
        )
        media = self.make_media(2, self.sizes[-1], seed=1)
        assert same(back.encode(media).codes, model.encode(media).codes)
        assert back(media).reconstruction.equal(model(media).reconstruction)

    @pytest.mark.parametrize("how", ["missing", "missing table", "mismatched", "unknown"])
    def test_weights_that_do_not_fit_are_named(self, tmp_path, how):
        model = self.make_model()
        model.save_pretrained(tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        tables = deciding(weights)
        assert sorted(tables) == sorted(deciding(model.state_dict())), "a table is not saved"
        name = next((name for name in tables if "table" in how), next(name for name in weights if "encoder." in name))
        value = weights.pop(name)
        if how == "mismatched":
            weights[name] = torch.zeros(*value.shape, 2)
        elif how == "unknown":
            weights.update({name: value, "encoder.of_something_else": value.clone()})
            name = "encoder.of_something_else"
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=f"do not fit the config.*{re.escape(name)}"):
            self.model_class.from_pretrained(tmp_path)

    def test_a_folder_without_good_weights_is_refused(self, tmp_path):
        self.make_model().save_pretrained(tmp_path)
        good = (tmp_path / "model.safetensors").read_bytes()
        for damaged in (good[: len(good) // 2], b"", b"not safetensors at all"):
            (tmp_path / "model.safetensors").write_bytes(damaged)
            with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))}: .*truncated or damaged"):
                self.model_class.from_pretrained(tmp_path)
        (tmp_path / "model.safetensors").unlink()
        torch.save({}, tmp_path / "pytorch_model.bin")  # a pickle is not an alternative
        with pytest.raises(OSError, match="model.safetensors"):
            self.model_class.from_pretrained(tmp_path)

    def test_building_without_memory(self):
        with torch.device("meta"):
            model = self.model_class(self.make_config())
        real = self.make_model()
        assert {value.device.type for value in model.state_dict().values()} == {"meta"}
        shapes = [{n: (v.shape, v.dtype) for n, v in each.state_dict().items()} for each in (model, real)]
        assert shapes[0] == shapes[1]

    # -- same codes, same media

    def test_forward_decodes_what_encode_says(self):
        model = self.make_model()
        for size in self.sizes:
            media = self.make_media(3, size)
            out, encoded = model(media), model.encode(media)
            assert same(out.codes, encoded.codes) and same(out.latents, encoded.latents)
            assert out.reconstruction.shape == self.output_shape(media)
            assert out.reconstruction.equal(model.decode(encoded.codes).reconstruction)
            assert same(out.quantized, model.embed_codes(encoded.codes)) and same(out.quantized, encoded.quantized)

    def test_quantized_is_the_table_row_itself(self):
        """Read off the stored numbers: the row bit for bit where it is stored, to rounding where it is computed from them."""
        model = self.make_model()
        out = model(self.make_media(2, self.sizes[0]))
        levels = zip(level_quantizers(model.quantizer), out.latents, out.codes, strict=True)
        for index, (quantizer, latents, codes) in enumerate(levels):
            parts = []
            for each, (leaf, z) in zip(codes.split(1, 1), in_turn(quantizer, latents), strict=True):
                encoded = leaf.encode(z)
                assert encoded.codes.equal(each)
                exact, table = rows(leaf)
                if exact:
                    assert encoded.quantized.equal(table[each[:, 0]])
                torch.testing.assert_close(encoded.quantized, table[each[:, 0]].float(), rtol=1e-5, atol=1e-6)
                parts.append(encoded.quantized)
            whole = torch.cat(parts, -1) if isinstance(quantizer, ProductQuantizer) else sum(parts[1:], parts[0])
            assert whole.equal(quantizer.embed_codes(codes))
            if isinstance(model.quantizer, HierarchicalQuantizer):  # of one grid they are brought to the full one
                assert whole.equal(out.quantized[index])

    def test_codes_have_the_layout(self):
        model = self.make_model()
        assert model.layout == model.config.layout
        for size in self.sizes:
            codes = model.encode(self.make_media(3, size)).codes
            assert isinstance(codes, tuple) and len(codes) == len(model.layout.levels)
            for value, level, grid in zip(codes, model.layout.levels, model.layout.grids(size), strict=True):
                assert value.dtype == torch.int64 and value.shape == (3, level.num_codebooks, *grid)
                assert value.min() >= 0 and value.max() < level.codebook_size
            batch = Codes(codes, torch.tensor([size] * 3), model.layout)
            back = Codes.from_bytes(batch.to_bytes())
            assert model.decode(back.levels).reconstruction.equal(model.decode(codes).reconstruction)

    def test_every_prefix_of_levels_decodes(self):
        model = self.make_model()
        for size in self.sizes:
            media = self.make_media(2, size)
            codes = model.encode(media).codes
            made = [model.decode(codes[:n]).reconstruction for n in range(1, len(codes) + 1)]
            assert all(each.shape == self.output_shape(media) and each.isfinite().all() for each in made)
            assert not any(a.equal(b) for a, b in zip(made, made[1:], strict=False)), "a level does not matter"

    def test_every_prefix_of_codebooks_decodes_where_they_refine_each_other(self):
        """Residual codebooks do; those side by side are all needed, and fewer are refused."""
        model = self.make_model()
        media = self.make_media(2, self.sizes[-1])
        codes = model.encode(media).codes
        for index, (quantizer, level) in enumerate(zip(level_quantizers(model.quantizer), codes, strict=True)):
            cut = [(*codes[:index], level[:, :depth], *codes[index + 1 :]) for depth in range(1, level.shape[1] + 1)]
            if isinstance(quantizer, ProductQuantizer):
                for fewer in cut[:-1]:
                    with pytest.raises(ValueError, match=rf"codes must be int64 \(B, {level.shape[1]}, \*grid\)"):
                        model.decode(fewer)
                continue
            made = [model.decode(each).reconstruction for each in cut]
            assert all(each.shape == self.output_shape(media) and each.isfinite().all() for each in made)
            assert not any(a.equal(b) for a, b in zip(made, made[1:], strict=False)), "a codebook does not matter"

    @pytest.mark.parametrize("how", ["high", "negative", "dtype", "depth", "axes", "grid", "batch", "empty"])
    def test_codes_of_a_wrong_kind_are_refused_before_any_lookup(self, how):
        model = self.make_model()
        codes = model.encode(self.make_media(2, self.sizes[-1])).codes
        last = len(codes) - 1
        level, shape = model.layout.levels[last], codes[last].shape
        bad = {
            "high": torch.where(torch.arange(shape[-1]) == 1, level.codebook_size, codes[last]),
            "negative": torch.where(torch.arange(shape[-1]) == 1, -1, codes[last]),
            "dtype": codes[last].int(),
            "depth": codes[last].repeat_interleave(level.num_codebooks + 1, 1),
            "axes": codes[last][:, 0],
            "grid": codes[last][..., :-1] if last else codes[last][..., :0],
            "batch": codes[last][:1] if last else codes[last][..., 0],
            "empty": codes[last][:, :0],
        }[how]
        with pytest.raises(ValueError, match=f"level {last}: "):
            model.decode((*codes[:last], bad))

    def test_what_is_no_tuple_of_levels_is_refused(self):
        model = self.make_model()
        size = self.sizes[0]
        codes = model.encode(self.make_media(1, size)).codes
        for bad in ((), (*codes, codes[-1]), codes[0], None, 3, [None], Codes(codes, [size], model.layout)):
            for call in (model.decode, model.embed_codes):
                with pytest.raises(ValueError, match="codes .*coarse to fine"):
                    call(bad)
        assert model.decode(list(codes)).reconstruction.isfinite().all()

    # -- codes belong to the sample

    def test_a_batch_has_the_codes_of_its_samples(self):
        model = self.make_model()
        quantizers = level_quantizers(model.quantizer)
        compared = 0
        for size in self.sizes:
            media = torch.cat([self.make_media(1, size, seed) for seed in range(2)])
            together = model.encode(media)
            for i in range(2):
                alone = model.encode(media[i : i + 1])
                for level, quantizer in enumerate(quantizers):
                    z, alone_z = together.latents[level], alone.latents[level]
                    assert (z[i : i + 1] - alone_z).abs().max() <= 1e-5 * float(alone_z.std())
                    compared += 1
                    seen = [[(leaf, x[i : i + 1]) for leaf, x in searched(quantizer, z)], searched(quantizer, alone_z)]
                    (_, p), (_, alone_p) = seen[0][0], seen[1][0]
                    assert (p - alone_p).abs().max() <= 1e-5 * float(alone_p.std()), "what is compared, too"
                    codes = [together.codes[level][i : i + 1], alone.codes[level]]
                    if check_differences(quantizer, *seen, *codes):
                        break  # the finer levels saw another condition
        assert compared >= 2 * len(self.sizes)

    @pytest.mark.parametrize("share", [1e-4, 0.03])
    def test_a_small_change_of_latents_changes_codes_only_at_near_ties(self, share):
        """So that the test above is not empty: these latents are moved by a share of their spread, and codes do change."""
        model = self.make_model()
        changed = []
        encoded = [model.encode(self.make_media(4, size)) for size in self.sizes]
        for level, quantizer in enumerate(level_quantizers(model.quantizer)):
            total = 0
            for z in (each.latents[level] for each in encoded):
                moved = z + share * z.std() * torch.randn_like(z)
                codes = [quantizer.encode(each).codes for each in (z, moved)]
                total += check_differences(quantizer, searched(quantizer, z), searched(quantizer, moved), *codes)
            changed.append(total)
        assert share < 0.01 or all(changed), "no code changed: the test shows nothing"

    def test_eval_is_deterministic_and_draws_no_random_numbers(self):
        model, media = self.make_model(), self.make_media(2, self.sizes[-1])
        first, before = model(media), torch.get_rng_state()
        second = model(media)
        assert torch.get_rng_state().equal(before)
        assert same(first.codes, second.codes) and first.reconstruction.equal(second.reconstruction)
        assert first.loss.equal(second.loss)

    # -- training

    @pytest.mark.parametrize("training", [False, True])
    def test_the_loss_is_one_finite_number(self, training):
        """The sum of its terms with their weights: those of the room, and while training those that the quantizer documents."""
        out = self.make_model().train(training)(self.make_media(2, self.sizes[0]))
        for loss in (out.loss, *out.losses.values()):
            assert loss.ndim == 0 and loss.dtype == torch.float32 and loss.isfinite()
        weights = {**self.media_terms, **(self.quantizer_terms if training else {})}
        assert out.losses.keys() == weights.keys()
        torch.testing.assert_close(out.loss, sum(weight * out.losses[name] for name, weight in weights.items()))
        assert out.losses["reconstruction_loss"] > 0

    def test_encode_never_changes_state(self):
        """In train mode neither, and between two training passes it leaves no trace in the next update."""
        model = self.make_model()
        twin, media, other = (
            copy.deepcopy(model),
            self.make_media(2, self.sizes[0]),
            self.make_media(3, self.sizes[-1], 5),
        )
        for each, mode in ((model, True), (twin, True)):
            each.train(mode)
        before = state(model)
        for _ in range(2):
            for each in (model, twin):
                torch.manual_seed(1)
                each(media)
            model.encode(other)
            assert same_state(state(model), before), "a pass without an update changed something"
            for each in (model, twin):
                each.update_codebooks()
            assert same_state(state(model), state(twin))
            before = state(model)

    def test_nothing_updates_in_eval(self):
        """An update after nothing but evaluation may count itself and let averages of use decay: no table moves."""
        model, media = self.make_model(), self.make_media(2, self.sizes[0])
        before = state(model)
        model(media)
        assert same_state(state(model), before)
        model.update_codebooks()
        changed = {name for name, value in state(model).items() if not value.equal(before[name])}
        assert all(name.startswith("quantizer.") and name.endswith((".counts", ".updates")) for name in changed)

    def test_gradients_reach_everything_that_trains(self):
        """Every parameter, in every pass: distributed training waits for each of them."""
        model = self.make_model().train()
        model(self.make_media(4, self.sizes[0])).loss.backward()
        names = dict(model.named_parameters())
        assert [name for name, value in names.items() if value.requires_grad and value.grad is None] == []
        for part in ("encoder", "decoder"):
            gradients = [
                value.grad.abs().sum() for name, value in names.items() if name.startswith(part) and value.requires_grad
            ]
            assert all(gradient.isfinite() for gradient in gradients) and sum(gradients) > 0
        for codebook in model.quantizer.codebooks:
            learned = isinstance(codebook.embedding, torch.nn.Parameter)
            assert learned == (codebook.update_rule == "gradient"), "an EMA table is a buffer, whatever the optimizer"
        for name in (name for name in names if name.startswith("quantizer.")):
            assert names[name].requires_grad and names[name].grad.isfinite().all(), name
            assert names[name].grad.abs().sum() > 0, name

    # -- precision

    def test_autocast_does_not_choose_the_codes(self):
        model, media = self.make_model(), self.make_media(4, self.sizes[-1])
        encoded, given = model.encode(media), proposals(model, media)
        with torch.autocast("cpu", torch.bfloat16):
            assert same(model.encode(media).codes, encoded.codes)
            levels = model.quantizer.encode(lambda level, quantized: given[level])
            assert same([out.codes for out in levels], encoded.codes)
            assert same([out.quantized for out in levels], encoded.quantized)
            assert model.train()(media).loss.isfinite()

    @pytest.mark.parametrize("how", ["from_pretrained", "to", "half"])
    def test_the_quantizer_stays_fp32(self, tmp_path, how):
        """All of it, projections too: after use, through every way of changing the dtype, and through saving what came of it."""
        model, media = self.make_model(), self.make_media(2, self.sizes[-1])
        encoded, given, quantizer = model.encode(media), proposals(model, media), state(model.quantizer)
        if how == "from_pretrained":
            model.save_pretrained(tmp_path)
            model = self.model_class.from_pretrained(tmp_path, dtype=torch.bfloat16)
        else:
            model = model.half() if how == "half" else model.to(torch.bfloat16)
        assert model.dtype in (torch.bfloat16, torch.float16)
        assert same_state(state(model.quantizer), quantizer)
        levels = model.quantizer.encode(lambda level, quantized: given[level])
        assert same([out.codes for out in levels], encoded.codes)
        assert same([out.quantized for out in levels], encoded.quantized)
        out = model(media)
        assert out.reconstruction.isfinite().all() and out.loss.dtype == torch.float32
        model.save_pretrained(tmp_path / "again")
        back = self.model_class.from_pretrained(tmp_path / "again", dtype=torch.float32)
        assert same_state(state(back.quantizer), quantizer)
        assert back(media).reconstruction.isfinite().all()

    def test_a_reloaded_table_is_used_at_once(self):
        model, media = self.make_model(), self.make_media(2, self.sizes[0])
        codes = model(media).codes
        other = self.model_class(self.make_config()).eval()
        model.load_state_dict(other.state_dict())
        assert same(model.embed_codes(codes), other.embed_codes(codes))
        assert same(model.encode(media).codes, other.encode(media).codes)

    # -- the code space

    def test_the_fingerprint_follows_what_decides_codes(self, tmp_path):
        model = self.make_model()
        expected = model.code_fingerprint(PREPROCESSING)
        model.save_pretrained(tmp_path)
        back = self.model_class.from_pretrained(tmp_path)
        assert back.code_fingerprint(PREPROCESSING) == expected
        assert back.code_fingerprint({"rescale": 1.0}) != expected
        with torch.no_grad():
            tensors = back.state_dict()
            for name, value in tensors.items():
                if name.startswith("decoder.") or name.endswith(BOOKKEEPING):
                    value.logical_not_() if value.dtype == torch.bool else value.add_(1)
            assert back.code_fingerprint(PREPROCESSING) == expected, "bookkeeping and the decoder decide no codes"
            for name in (next(name for name in tensors if name.startswith("encoder.")), *deciding(tensors)):
                tensors[name].view(-1)[0] += 1
                assert (changed := back.code_fingerprint(PREPROCESSING)) != expected, name
                expected = changed

    def test_training_forgets_the_fingerprint(self):
        model = self.make_model()
        model.config.fingerprint = "f"
        assert model.eval().config.fingerprint == "f"
        model.encoder.requires_grad_(False)  # tables that move are enough; without any, codes stay what they are
        can_move = bool(deciding(model.state_dict()))
        assert model.train().config.fingerprint == (None if can_move else "f")
        model.encoder.requires_grad_(True)
        assert model.train().config.fingerprint is None
        model.config.fingerprint = "f"
        model.init_codebooks([self.make_media(8, self.sizes[0])])
        assert model.config.fingerprint is None

    def test_only_the_decoder_learns_when_codes_are_frozen(self):
        model, media = self.make_model(), self.make_media(4, self.sizes[0])
        model.config.fingerprint = expected = model.code_fingerprint(PREPROCESSING)
        codes, before = model.encode(media).codes, state(model)
        model.freeze_codes()
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(media).loss.backward()
            optimizer.step()
            model.update_codebooks()
        changed = {name for name, value in state(model).items() if not value.equal(before[name])}
        assert changed and all(name.startswith("decoder.") for name in changed)
        assert same(model.eval().encode(media).codes, codes)
        assert model.code_fingerprint(PREPROCESSING) == expected == model.config.fingerprint
