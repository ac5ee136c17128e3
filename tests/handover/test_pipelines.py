"""Exports in the stock pipelines, built of tiny random parts: shapes, and scaling and shift.

Each pipeline samples once as latents and once as pictures, from the same noise; the pictures must
be the decoder's of exactly the latents that its rule of scaling and shift gives.
"""

import pytest
import torch
from autoencoders import build_autoencoder, tiny_kl
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from pipelines import STEPS, sample, stable_diffusion_xl, unet

from first_stage.handover.card import model_card
from first_stage.handover.export import write_export
from first_stage.handover.folding import fold_statistics
from first_stage.handover.statistics import LatentStatistics

MEAN, STD = [0.5, -1.0, 0.25, 2.0], [0.5, 2.0, 1.0, 3.0]
STATISTICS = LatentStatistics(MEAN, STD, 0.4375, 2.0, images=8, largest_activation=1.0)


def first_stage(levels: int = 2) -> AutoencoderKL:
    torch.manual_seed(0)
    return build_autoencoder(3, 4, (8,) * levels, 1, 4, False, True, 16).eval()


@pytest.fixture
def exported(tmp_path) -> AutoencoderKL:
    """An export with measured scaling and shift, loaded back."""
    write_export(first_stage(), STATISTICS, tmp_path / "export", {})
    return AutoencoderKL.from_pretrained(tmp_path / "export")


@pytest.fixture
def folded(tmp_path) -> AutoencoderKL:
    """The same with its statistics folded in, saved and loaded back."""
    fold_statistics(first_stage(), MEAN, STD).save_pretrained(tmp_path / "folded")
    return AutoencoderKL.from_pretrained(tmp_path / "folded")


def stable_diffusion(vae):
    pipeline = StableDiffusionPipeline(
        vae=vae, unet=unet(), text_encoder=None, tokenizer=None, scheduler=DDIMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    prompt = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(1))
    return pipeline, {"prompt_embeds": prompt, "negative_prompt_embeds": -prompt}


def stable_diffusion_3(vae):
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=1,
        attention_head_dim=8, num_attention_heads=2, joint_attention_dim=8,
        caption_projection_dim=16, pooled_projection_dim=8, pos_embed_max_size=8,
    )  # fmt: skip
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
        text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    prompt = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(1))
    return pipeline, {
        "prompt_embeds": prompt, "negative_prompt_embeds": -prompt,
        "pooled_prompt_embeds": prompt[:, 0], "negative_pooled_prompt_embeds": -prompt[:, 0],
    }  # fmt: skip


def flux(vae):
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=8, pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae, transformer=transformer,
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
    )  # fmt: skip
    prompt = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(1))
    return pipeline, {"prompt_embeds": prompt, "pooled_prompt_embeds": prompt[:, 0]}


def decoded(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize(
    ("build", "uses_shift"),
    [(stable_diffusion, False), (stable_diffusion_3, True), (flux, True)],
)
def test_scaling_and_shift(exported, build, uses_shift):
    latents, pictures = sample(build, exported)
    scaling, shift = exported.config.scaling_factor, exported.config.shift_factor
    assert (scaling, shift) == (0.5, 0.4375)
    raw = latents / scaling
    expected = decoded(exported, raw + shift if uses_shift else raw)
    torch.testing.assert_close(pictures, expected, atol=1e-5, rtol=0)
    other = decoded(exported, raw if uses_shift else raw + shift)
    assert (pictures - other).abs().max() > 1e-3


def test_xl_takes_the_statistics_per_channel_where_the_config_has_them(exported):
    """And scaling_factor on top of them: our exports keep them out of the config."""
    assert exported.config.latents_mean is None
    exported.register_to_config(latents_mean=MEAN, latents_std=STD)
    latents, pictures = sample(stable_diffusion_xl, exported)
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    per_channel = latents * std / exported.config.scaling_factor + mean
    torch.testing.assert_close(pictures, decoded(exported, per_channel), atol=1e-5, rtol=0)
    exported.register_to_config(latents_mean=None, latents_std=None)
    latents, pictures = sample(stable_diffusion_xl, exported)
    plain = decoded(exported, latents / exported.config.scaling_factor)
    torch.testing.assert_close(pictures, plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize("build", [stable_diffusion, stable_diffusion_xl, stable_diffusion_3, flux])
def test_no_pipeline_gets_a_folded_first_stage_wrong(folded, build):
    """The latents that a diffusion model makes are the latents that are decoded."""
    latents, pictures = sample(build, folded)
    torch.testing.assert_close(pictures, decoded(folded, latents), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["exported", "folded"])
def test_dit(kind, request):
    vae = request.getfixturevalue(kind)
    torch.manual_seed(3)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=4, num_layers=1,
        sample_size=8, patch_size=2, num_embeds_ada_norm=1000, norm_num_groups=4,
    ).eval()  # fmt: skip
    pipeline = DiTPipeline(transformer=transformer, vae=vae, scheduler=DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    seen = []
    decode = vae.decode
    vae.decode = lambda latents, *more, **named: (
        seen.append(latents.clone()) or decode(latents, *more, **named)
    )
    # What reaches the decoder is the sampled latents over the scaling factor; no shift is added.
    made = {}
    for scaling in (vae.config.scaling_factor, 1.0):
        vae.register_to_config(scaling_factor=scaling)
        made[scaling] = pipeline(
            class_labels=[1, 2], num_inference_steps=STEPS, output_type="np",
            generator=torch.Generator().manual_seed(2),
        ).images  # fmt: skip
        assert made[scaling].shape == (2, 16, 16, 3)
    scaled, raw = seen
    torch.testing.assert_close(scaled, raw / (0.5 if kind == "exported" else 1.0))


def test_the_card_warns_of_the_pipelines_that_ignore_the_shift():
    card = model_card(
        tiny_kl(), STATISTICS, data="photos", recipe="seed: 0", metrics={"psnr": 30.0}, steps=1,
        images_seen=1, picture=None,
    )  # fmt: skip
    warning = card[card.index("ignore") :]
    for name in (StableDiffusionPipeline, StableDiffusionXLPipeline, DiTPipeline):
        assert name.__name__ in warning
