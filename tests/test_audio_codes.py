"""Audio tokenizers with one interface, against the tokenizers' own codes and reconstructions."""

import json

import numpy as np
import pytest
import torch
import transformers
from diffusers import VQModel
from safetensors.torch import save_file
from transformers import DacConfig, EncodecConfig, HubertConfig, HubertModel, MimiConfig, Wav2Vec2FeatureExtractor

from transfusion_mot.codecs.audio_codes import AudioCodes
from transfusion_mot.codecs.base import AudioCodec, CodeCodec
from transfusion_mot.codecs.hubert_units import HubertUnits
from transfusion_mot.codecs.load import load_codec
from transfusion_mot.config import CodecConfig
from transfusion_mot.errors import UserError

# No length is a whole number of frames of any of the models; the second is shorter than a frame of most.
WAVEFORMS = [torch.rand(length, generator=torch.Generator().manual_seed(length)) - 0.5 for length in (3001, 37, 1600)]
RATIOS = [4, 4]


def needed(name):
    return getattr(transformers, name, None) or pytest.skip(f"this transformers has no {name}")


def mimi():
    sizes = {"hidden_size": 16, "num_filters": 4, "codebook_size": 16, "codebook_dim": 8, "upsample_groups": 4}
    sizes |= {"vector_quantization_hidden_dimension": 8, "num_hidden_layers": 1, "intermediate_size": 16}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_quantizers": 4}
    return transformers.MimiModel(MimiConfig(upsampling_ratios=RATIOS, **sizes))


def encodec(**changes):
    # 24000 / 16 frames a second of 4 bits: 6 kbit/s a codebook.
    sizes = {"hidden_size": 8, "num_filters": 4, "codebook_size": 16, "target_bandwidths": [6.0, 12.0, 24.0]}
    return transformers.EncodecModel(EncodecConfig(upsampling_ratios=RATIOS, **(sizes | changes)))


def dac():
    sizes = {"encoder_hidden_size": 4, "decoder_hidden_size": 16, "n_codebooks": 4, "codebook_size": 16}
    return transformers.DacModel(DacConfig(downsampling_ratios=RATIOS, codebook_dim=4, **sizes))


def hubert():
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "conv_dim": (8, 8)}
    sizes |= {"num_hidden_layers": 3, "conv_stride": (4, 4), "conv_kernel": (8, 4)}
    sizes |= {"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    # With this norm, and biases, loudness makes a difference.
    return HubertConfig(**sizes, feat_extract_norm="layer", conv_bias=True)


def xcodec():
    model_class = needed("XcodecModel")
    acoustic = {"encoder_hidden_size": 4, "decoder_hidden_size": 16, "hidden_size": 16}
    acoustic = DacConfig(downsampling_ratios=RATIOS, upsampling_ratios=RATIOS, **acoustic)
    sizes = {"acoustic_model_config": acoustic, "semantic_model_config": hubert(), "codebook_size": 16}
    # 16000 / 16 frames a second of 4 bits: 4 kbit/s a codebook.
    return model_class(transformers.XcodecConfig(target_bandwidths=[4, 16], **sizes))


def xcodec2():
    model_class = needed("Xcodec2Model")
    semantic = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    semantic = transformers.Wav2Vec2BertConfig(**semantic, feature_projection_input_dim=160)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "encoder_hidden_size": 4,
        "quantization_levels": [4, 4],
        "hidden_size": 64,
    }
    return model_class(transformers.Xcodec2Config(semantic_model_config=semantic, quantization_dim=80, **sizes))


def wav_tokenizer():
    model_class = needed("WavTokenizerModel")
    sizes = {"hidden_size": 8, "codebook_dim": 8, "codebook_size": 16, "num_filters": 4, "decoder_num_layers": 1}
    sizes |= {"decoder_hidden_size": 8, "decoder_intermediate_size": 8, "decoder_attention_num_groups": 2}
    return model_class(transformers.WavTokenizerConfig(upsampling_ratios=RATIOS, **sizes))


def seeded(build, **changes):
    """With larger weights in layers where the default ones give the same code everywhere, or silence."""
    torch.manual_seed(0)
    model = build(**changes).eval()
    for name, weights in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith((".embed", ".embed_sum")):
            weights.data = 0.05 * torch.randn_like(weights)
        if build is xcodec2 and weights.ndim > 1:
            weights.data = 0.3 * torch.randn_like(weights)
    return model


def own_codes(model, waveform, num_codebooks):
    """Codes [Q, F] as the examples of transformers call the class."""
    values = waveform[None, None]
    match type(model).__name__:
        case "MimiModel":
            return model(values, num_quantizers=num_codebooks).audio_codes[0]
        case "EncodecModel":
            return model.encode(values, bandwidth={1: 6.0, 2: 12.0}[num_codebooks]).audio_codes[0, 0]
        case "DacModel":
            padded = transformers.DacFeatureExtractor(hop_length=16)(waveform.numpy(), sampling_rate=16000)
            values = torch.tensor(np.stack(padded["input_values"]))
            return model(values, n_quantizers=num_codebooks).audio_codes[0]
        case "XcodecModel":
            padded = transformers.DacFeatureExtractor(hop_length=16)(waveform.numpy(), sampling_rate=16000)
            values = torch.tensor(np.stack(padded["input_values"]))
            return model(values, bandwidth=4).audio_codes[0]
        case "Xcodec2Model":
            pytest.importorskip("torchaudio", reason="transformers' own features need it", exc_type=ImportError)
            extractor = transformers.Xcodec2FeatureExtractor()
            return model(**extractor(waveform.numpy(), sampling_rate=16000, return_tensors="pt")).audio_codes[0]
        case "WavTokenizerModel":
            return model(values).audio_codes[0]


@pytest.mark.parametrize("waveform", WAVEFORMS, ids=lambda waveform: f"{len(waveform)} samples")
@pytest.mark.parametrize(
    ("build", "num_codebooks"),
    [
        (mimi, 1),
        (mimi, 2),
        (encodec, 1),
        (encodec, 2),
        (dac, 1),
        (dac, 2),
        (xcodec, 1),
        (xcodec2, 1),
        (wav_tokenizer, 1),
    ],
)
@torch.no_grad()
def test_codes_and_sound_are_those_of_the_class(build, num_codebooks, waveform) -> None:
    model = seeded(build)
    codec = AudioCodes(model, num_codebooks)
    own = own_codes(model, waveform, num_codebooks)
    (codes,) = codec.encode([waveform])
    assert len(codes) == own.numel()
    assert len(waveform) < 3000 or len(own.unique()) > 1
    # Frame by frame; each codebook of 16 has numbers of its own.
    assert codes.tolist() == [code + 16 * book for frame in own.T.tolist() for book, code in enumerate(frame)]
    assert codec.codebook_size == 16 * num_codebooks
    assert abs(len(codes) - len(waveform) / codec.sample_rate * codec.codes_per_second) <= 2 * num_codebooks

    arguments = {"audio_codes": own[None]} if build is not encodec else {"audio_codes": own[None, None]}
    if build is encodec:
        arguments["audio_scales"] = [None]
    values = model.decode(**arguments).audio_values.flatten().clamp(-1, 1)
    assert values.std() > 0
    torch.testing.assert_close(codec.decode(codes), values)


@pytest.mark.parametrize("build", [mimi, encodec, dac])
def test_waveforms_do_not_see_each_other(build) -> None:
    codec = AudioCodes(seeded(build))
    assert isinstance(codec, AudioCodec)
    assert not isinstance(codec, CodeCodec)
    together = codec.encode(WAVEFORMS)
    for waveform, codes in zip(WAVEFORMS, together, strict=True):
        assert codes.tolist() == codec.encode([waveform])[0].tolist()


def test_generated_codes_need_not_be_whole_frames() -> None:
    codec = AudioCodes(seeded(dac), 2)
    right = torch.tensor([3, 16 + 5, 7, 16 + 1])
    # The second code of the first frame is of the first codebook; the last frame has one code.
    torch.testing.assert_close(codec.decode(torch.tensor([3, 5, 7, 16 + 1, 9])), codec.decode(right))
    for codes in (right[:1], right[:0]):
        assert codec.decode(codes).shape == (0,)


def test_half_precision_weights_are_computed_in_float32() -> None:
    model = seeded(dac).half().float()
    expected = AudioCodes(model).encode(WAVEFORMS[:1])[0]
    codec = AudioCodes(seeded(dac).half())
    with torch.autocast("cpu", torch.bfloat16):
        assert codec.encode(WAVEFORMS[:1])[0].tolist() == expected.tolist()


def test_a_folder_remembers_how_many_codebooks_are_used(tmp_path) -> None:
    codec = AudioCodes(seeded(mimi), 3)
    codec.model.save_pretrained(tmp_path)
    again = load_codec(CodecConfig(str(tmp_path)), "next_token", "cpu")
    assert isinstance(again, AudioCodes)
    assert (again.num_codebooks, again.fingerprint) == (3, codec.fingerprint)
    assert again.encode(WAVEFORMS)[0].tolist() == codec.encode(WAVEFORMS)[0].tolist()
    fewer = load_codec(CodecConfig(str(tmp_path), num_codebooks=1), "next_token", "cpu")
    assert fewer.fingerprint != codec.fingerprint
    fewer.model.save_pretrained(tmp_path / "fewer")
    assert load_codec(CodecConfig(str(tmp_path / "fewer")), "next_token", "cpu").codebook_size == 16
    with pytest.raises(UserError, match="num_codebooks is 5; this MimiModel gives 1 to 4"):
        load_codec(CodecConfig(str(tmp_path), num_codebooks=5), "next_token", "cpu")
    with pytest.raises(UserError, match="is of class MimiModel, but the objective diffusion needs AutoencoderKL;"):
        load_codec(CodecConfig(str(tmp_path)), "diffusion", "cpu")
    with pytest.raises(UserError, match="is of class MimiModel, and its layer is set, which is for HubertModel;"):
        load_codec(CodecConfig(str(tmp_path), layer=4), "next_token", "cpu")


def test_codes_of_which_loudness_is_apart_are_refused() -> None:
    with pytest.raises(UserError, match="this EncodecModel is stereo or stores the loudness"):
        AudioCodes(seeded(encodec, normalize=True))
    with pytest.raises(UserError, match="use one like facebook/encodec_24khz"):
        AudioCodes(seeded(encodec, audio_channels=2))


CENTROIDS = torch.randn(12, 16, generator=torch.Generator().manual_seed(1))


def hubert_folder(folder, centroids=CENTROIDS):
    torch.manual_seed(0)
    model = HubertModel(hubert())
    for name, weights in model.named_parameters():
        if ".feed_forward." in name and weights.ndim > 1:
            # Layers that differ.
            weights.data = torch.randn_like(weights)
    model.save_pretrained(folder)
    np.save(folder / "kmeans.npy", centroids.numpy())
    return str(folder)


@torch.no_grad()
@pytest.mark.parametrize("layer", [None, 2])
def test_units_are_the_nearest_centroids_to_a_layer(tmp_path, layer) -> None:
    path = hubert_folder(tmp_path)
    Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(path)
    codec = load_codec(CodecConfig(path, layer=layer), "next_token", "cpu")
    model = HubertModel.from_pretrained(path).eval()
    values = Wav2Vec2FeatureExtractor()(WAVEFORMS[0].numpy(), sampling_rate=16000, return_tensors="pt").input_values
    states = model(values, output_hidden_states=True).hidden_states[3 if layer is None else layer][0]
    distances = (states[:, None] - CENTROIDS).square().sum(-1)
    (units,) = codec.encode([WAVEFORMS[0]])
    assert units.tolist() == distances.argmin(1).tolist()
    assert len(units.unique()) > 1
    assert (codec.codebook_size, codec.codes_per_second, codec.has_decoder) == (12, 1000.0, False)
    # 20 samples are the least that give a unit.
    assert [len(units) for units in codec.encode([torch.ones(1), torch.ones(20), torch.ones(35), torch.ones(36)])] == [
        *(1, 1, 1, 2)
    ]
    with pytest.raises(UserError, match="HubertUnits has no decoder, so its codes cannot become audio; use it to read"):
        codec.decode(units)

    assert isinstance(codec.model, HubertUnits)
    codec.model.save_pretrained(tmp_path / "saved")
    again = load_codec(CodecConfig(str(tmp_path / "saved")), "next_token", "cpu")
    assert again.fingerprint == codec.fingerprint
    assert again.encode(WAVEFORMS[:1])[0].tolist() == units.tolist()


def test_a_hubert_without_fitting_centroids_is_refused(tmp_path) -> None:
    path = hubert_folder(tmp_path, torch.ones(3, 4))
    with pytest.raises(UserError, match=r"has the shape \[3, 4\]; centroids of this HubertModel are rows of 16"):
        load_codec(CodecConfig(path), "next_token", "cpu")
    save_file({"centroids": CENTROIDS}, tmp_path / "kmeans.safetensors")
    with pytest.raises(UserError, match="layer is 4; this HubertModel has layers 0 to 3"):
        load_codec(CodecConfig(path, layer=4), "next_token", "cpu")
    (tmp_path / "kmeans.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read as one array of centroids"):
        load_codec(CodecConfig(path), "next_token", "cpu")
    for name in ("kmeans.safetensors", "kmeans.npy"):
        (tmp_path / name).unlink()
    with pytest.raises(UserError, match=r"put the centroids of k-means into its folder as kmeans\.npy"):
        load_codec(CodecConfig(path), "next_token", "cpu")


def test_other_classes_are_refused(tmp_path) -> None:
    for name, found in (("HubertForCTC", "save its `hubert`"), ("WhisperModel", "WavTokenizerModel")):
        (tmp_path / "config.json").write_text(json.dumps({"architectures": [name]}))
        with pytest.raises(UserError, match=found):
            load_codec(CodecConfig(str(tmp_path)), "next_token", "cpu")
    VQModel(block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"is of class VQModel; one of MimiModel, .* is needed"):
        AudioCodes.load(CodecConfig(str(tmp_path)), "cpu")
