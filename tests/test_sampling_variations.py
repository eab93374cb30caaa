"""Variations and repainting: the model's input from the picture, with every solver, and what is preserved."""

import numpy as np
import pytest
import torch
from PIL import Image
from test_pipeline import IMAGE_SIZE, seeds, tiny_pipeline

from transfusion_mot.diffusion import Diffusion, Variation
from transfusion_mot.errors import UserError
from transfusion_mot.schedulers import fit_samplers, make_sampling_scheduler, make_scheduler

TRAINED = {
    "flow": make_scheduler("FlowMatchEulerDiscreteScheduler", {}),
    "shifted flow": make_scheduler("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "epsilon": make_scheduler("DDPMScheduler", {}),
    "v": make_scheduler("DDPMScheduler", {"prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2"}),
    "sample": make_scheduler("DDPMScheduler", {"prediction_type": "sample"}),
}
SOLVERS = [(kind, name) for kind, trained in TRAINED.items() for name in fit_samplers(trained)]


@pytest.mark.parametrize(("kind", "name"), SOLVERS, ids=[f"{kind} {name}" for kind, name in SOLVERS])
def test_the_model_sees_the_picture_with_the_noise_of_each_step(kind, name) -> None:
    torch.manual_seed(0)
    trained = Diffusion(TRAINED[kind])
    solver = Diffusion(make_sampling_scheduler(TRAINED[kind], name))
    clean, noise, other = torch.randn(3, 2, 3, 4, 4, dtype=torch.float64)
    repaint = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    repaint[:, :, :, 2:] = True
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    seen = []

    def predict(noisy, timestep):
        seen.append(float(timestep))
        expected = trained.add_noise(clean, noise, timestep)
        part = slice(None) if len(seen) == 1 else slice(2)
        torch.testing.assert_close(noisy[..., part], expected[..., part], rtol=1e-4, atol=1e-5)
        # What a perfect network says that wants to see `other` everywhere.
        alpha, sigma = (value.clamp(min=1e-6) for value in trained.alpha_sigma(timestep))
        return trained.target(other, (noisy - alpha * other) / sigma, timestep)

    def on_step(step, latents, estimate):
        torch.testing.assert_close(estimate(), other, rtol=1e-3, atol=1e-3)

    result = solver.sample(predict, noise, 20, generators, on_step, Variation(clean, 0.5, repaint))
    assert abs(seen[0] - 0.5) < 0.2
    assert torch.equal(result[..., :2], clean[..., :2])
    if ":sde" not in name and name != "DDPMScheduler":
        torch.testing.assert_close(result[..., 2:], other[..., 2:], rtol=0.02, atol=0.05)


def test_strength_is_a_share_of_the_steps_and_one_forgets_the_picture(pipeline) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(256, size=(12, 20, 3), dtype=np.uint8))
    steps = []
    settings = {
        "num_inference_steps": 10,
        "guidance_scale": 1.0,
        "output_type": "latent",
        "callback_on_step_end": lambda pipe, step, timestep, tensors: steps.append(step),
    }
    (given,) = pipeline._encode([picture])
    distances = []
    for strength in (0.01, 0.5, 1.0):
        image = pipeline("sun", image=picture, strength=strength, generator=seeds(1), **settings).images
        distances.append(float((image - given.content).norm()))
    assert steps == [9, *range(5, 10), *range(10)]
    assert distances == sorted(distances)
    assert torch.equal(image, pipeline("sun", generator=seeds(1), **settings).images)


def test_black_pixels_of_a_mask_stay_as_they_are(pipeline) -> None:
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(256, size=(IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)) for _ in range(2)]
    white = np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)
    white[2:7, 3:5] = 255
    mask = Image.fromarray(white)
    painted = pipeline(
        ["sun", "an octopus"], num_images_per_prompt=2, image=pictures, mask_image=mask, generator=seeds(1, 2, 3, 4)
    ).images
    for number, image in enumerate(painted):
        before, after = np.asarray(pictures[number // 2]), np.asarray(image)
        assert np.array_equal(before[white == 0], after[white == 0])
        assert (before[white == 255] != after[white == 255]).any()
    assert not np.array_equal(*map(np.asarray, painted[:2]))
    latents = pipeline("sun", image=pictures[0], mask_image=mask, output_type="latent").images
    touched = white.reshape(4, 2, 4, 2).max(axis=(1, 3)) > 0
    (expected,) = pipeline._encode(pictures[:1])
    assert torch.equal(latents[0, :, ~touched], expected.content[:, ~touched])
    assert not torch.isclose(latents[0, :, touched], expected.content[:, touched]).any()


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline()


PICTURE = Image.new("RGB", (20, 10))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask_image": PICTURE}, "mask_image and no image"),
        (
            {"image": PICTURE, "mask_image": Image.new("L", (10, 20), 255)},
            "mask_image has 10 x 20 pixels, but image 20 x",
        ),
        ({"image": PICTURE, "mask_image": Image.new("1", (20, 10))}, "no white pixel"),
        ({"image": PICTURE, "strength": 0.0}, "strength is 0.0; it must be above 0 and at most 1"),
        ({"image": PICTURE, "strength": 1.5}, "strength is 1.5"),
        ({"image": PICTURE, "strength": float("nan")}, "strength is nan"),
        ({"image": [PICTURE] * 3}, "3 pictures in image for 2 prompts"),
        ({"image": []}, "0 pictures in image for 2 prompts"),
        ({"image": "a.png"}, "image must be PIL images, arrays or tensors, got str"),
        ({"image": PICTURE, "mask_image": np.zeros((10, 20))}, "no white pixel"),
        ({"image": PICTURE, "mask_image": np.zeros((10, 20, 2))}, r"mask_image has the shape \[10, 20, 2\]"),
    ],
)
def test_mistakes_are_named(pipeline, arguments, message) -> None:
    with pytest.raises(UserError, match=message):
        pipeline(["sun", "a red apple"], **arguments)
