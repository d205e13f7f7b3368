"""The joint loss on the text: DALL-E's weighting, against a slow reference, token by token."""

from types import SimpleNamespace

import pytest
import torch

from vqtok.prior import CodePriorConfig, pad_conditions
from vqtok.training.steps import PriorStep

TWO = {"ndim": 2, "levels": [{"stride": s, "num_codebooks": 1, "codebook_size": k} for s, k in ((8, 11), (4, 7))]}
RESIDUAL = {"ndim": 2, "levels": [{"stride": 8, "num_codebooks": 3, "codebook_size": 6}]}
AUDIO = {"ndim": 1, "levels": [{"stride": 4, "num_codebooks": 2, "codebook_size": 6}]}
ORDERS = {"flat": TWO, "delay": RESIDUAL, "depth": RESIDUAL, "next_scale": TWO}
TEXTS = [[3, 1, 4, 1], [2, 7], [5], None, [9, 2, 6, 5, 3]]


@torch.no_grad()
def slow_text_nats(prior, texts):
    """Mean of -ln p(token | earlier tokens of its text), each from a pass of its own over these tokens alone."""
    nats = []
    for text in texts:
        for at in range(1, len(text or [])):
            x = prior.get_input_embeddings()(torch.tensor([text[:at]]))
            first = prior.config.prefix_length - len(text)
            positions = torch.arange(first, first + at)[None]
            hidden = prior.backbone(inputs_embeds=x, position_ids=positions).last_hidden_state
            nats.append(-prior.text_head(hidden[0, -1]).log_softmax(0)[text[at]])
    return torch.stack(nats).double().mean()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("backbone", ["llama", "gpt2"])
def test_each_token_is_predicted_from_its_own_earlier_tokens(make_prior, random_codes, order, backbone):
    layout, fields = ORDERS[order], {"order": order}
    prior = make_prior(layout, backbone, text_loss_weight=1 / 8, **fields)
    codes = random_codes(layout, len(TEXTS), (2, 2))
    ids, mask = pad_conditions([text or [] for text in TEXTS])
    output = prior(codes=codes, condition_ids=ids, condition_mask=mask)
    assert output.text_loss.ndim == 0 and output.text_loss.dtype == torch.float32
    assert abs(output.text_loss.item() - float(slow_text_nats(prior, TEXTS))) < 1e-5
    plain = make_prior(layout, backbone, **fields)
    plain.load_state_dict({k: v for k, v in prior.state_dict().items() if k != "text_head.weight"})
    other = plain(codes=codes, condition_ids=ids, condition_mask=mask)
    assert other.text_loss is None
    assert torch.allclose(output.loss, output.text_loss / 8 + 7 / 8 * other.loss, atol=1e-5)
    assert torch.allclose(output.nats_per_code, other.nats_per_code, atol=1e-5)


def test_windows_and_time_series(make_prior, random_codes):
    prior = make_prior(AUDIO, stops=True, window=6, max_grid=16, text_loss_weight=0.2)
    codes = random_codes(AUDIO, 3, (9,))
    ids, mask = pad_conditions(TEXTS[:3])
    batch = {"codes": codes, "sizes": torch.tensor([[36], [20], [8]]), "condition_ids": ids, "condition_mask": mask}
    wanted = float(slow_text_nats(prior, TEXTS[:3]))
    assert abs(prior(**batch).text_loss.item() - wanted) < 1e-5
    prior.train()
    prior.config.condition_dropout = 0
    assert all(abs(prior(**batch).text_loss.item() - wanted) < 1e-5 for _ in range(4)), "whatever window is trained"


def test_padding_null_and_dropped_conditions_do_not_count(make_prior, random_codes):
    prior = make_prior(text_loss_weight=0.5)
    codes = random_codes(TWO, 3, (2, 2))
    ids, mask = pad_conditions([[], [3, 1, 4], []])
    some = prior(codes=codes, condition_ids=ids, condition_mask=mask).text_loss
    assert abs(some.item() - float(slow_text_nats(prior, [[3, 1, 4]]))) < 1e-5
    ids[0] = 7  # under the mask
    assert prior(codes=codes, condition_ids=ids, condition_mask=mask).text_loss == some
    for batch in ({}, {"condition_ids": torch.tensor([[3]] * 3)}):  # nothing to predict, a first token alone
        output = prior(codes=codes, **batch)
        assert output.text_loss == 0
        output.loss.backward()
        assert prior.text_head.weight.grad is not None, "every parameter takes part, as several processes need"
    prior.train()
    prior.config.condition_dropout = 0.999999
    assert prior(codes=codes, condition_ids=torch.tensor([[3, 4]] * 3)).text_loss == 0


def test_training_logs_it(make_prior, random_codes):
    prior = make_prior(text_loss_weight=0.5)
    batch = {"codes": random_codes(TWO, 2, (2, 2)), "condition_ids": torch.tensor([[3, 4]] * 2)}
    step = SimpleNamespace(prepared=prior, accelerator=SimpleNamespace(device=prior.device))
    loss, metrics = PriorStep.compute(step, batch)
    output = prior(**batch)
    assert torch.equal(loss, output.loss) and torch.equal(metrics["text_loss"], output.text_loss.detach())
    step.prepared = make_prior()
    assert set(PriorStep.compute(step, batch)[1]) == {"nats_level_0", "nats_level_1"}


def test_off_has_no_parameters_and_on_is_saved(make_prior, tmp_path):
    off, on = make_prior(), make_prior(text_loss_weight=0.125)
    extra = set(on.state_dict()) - set(off.state_dict())
    assert extra == {"text_head.weight"} and on.text_head.weight.shape == (20, 32)
    on.save_pretrained(tmp_path)
    again = type(on).from_pretrained(tmp_path)
    assert torch.equal(again.text_head.weight, on.text_head.weight) and again.config.text_loss_weight == 0.125
    assert CodePriorConfig.from_pretrained(tmp_path).text_loss_weight == 0.125
