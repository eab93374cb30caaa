"""Speech by the engine espeak-ng from the package `espeakng-loader`, which contains its voices.

The engine's state is global and not thread-safe: a process speaks one text at a time.
"""

import ctypes
from functools import cache

import numpy as np
import numpy.typing as npt

from transfusion_mot.data.audio import Audio
from transfusion_mot.errors import UserError

# espeak-ng/speak_lib.h: espeak_AUDIO_OUTPUT, espeak_PARAMETER, espeakCHARS_UTF8, POS_CHARACTER.
_SYNCHRONOUS = 2
_RATE, _PITCH = 1, 3
_UTF8 = 1
_BY_CHARACTER = 1
_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


class _Engine:
    def __init__(self) -> None:
        try:
            import espeakng_loader
        except ImportError:
            raise UserError(
                "speaking needs the package espeakng-loader: pip install 'transfusion-mot[speech]'"
            ) from None
        self.library = ctypes.CDLL(espeakng_loader.get_library_path())
        data = str(espeakng_loader.get_data_path()).encode()
        self.library.espeak_Initialize.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_int)
        self.sample_rate: int = self.library.espeak_Initialize(_SYNCHRONOUS, 0, data, 0)
        if self.sample_rate <= 0:
            raise UserError("espeak-ng does not start; install the package espeakng-loader again")
        self.library.espeak_SetVoiceByName.argtypes = (ctypes.c_char_p,)
        self.library.espeak_Synth.argtypes = (
            ctypes.c_char_p,
            ctypes.c_size_t,
            ctypes.c_uint,
            ctypes.c_int,
            ctypes.c_uint,
            ctypes.c_uint,
            ctypes.c_void_p,
            ctypes.c_void_p,
        )
        self.spoken: list[npt.NDArray[np.int16]] = []
        # Kept in a variable, so that it is not garbage-collected while the engine has its address.
        self._callback = _Callback(self._receive)
        self.library.espeak_SetSynthCallback(self._callback)

    def _receive(self, samples: "ctypes._Pointer[ctypes.c_short]", count: int, events: int | None) -> int:
        if samples and count > 0:
            self.spoken.append(np.ctypeslib.as_array(samples, shape=(count,)).copy())
        return 0


@cache
def _engine() -> _Engine:
    return _Engine()


def check_voices(voices: list[str]) -> None:
    """Refuse voices that the engine does not have.

    Raises:
        UserError: A voice or the package is missing.
    """
    for voice in voices:
        if _engine().library.espeak_SetVoiceByName(voice.encode()):
            raise UserError(f"espeak-ng has no voice '{voice}'; install the package espeakng-loader again")


def speak(text: str, voice: str, *, words_per_minute: int, pitch: int) -> Audio:
    """Text => speech, 22,050 samples a second.

    The engine's voices vary randomly: two calls with the same text give different samples.

    Args:
        text: English text.
        voice: An accent and a variant, such as "en-us+f2".
        words_per_minute: 80 to 450; the engine's default is 175.
        pitch: 0 to 99, relative to the voice; 50 is the default.
    """
    engine = _engine()
    check_voices([voice])
    engine.library.espeak_SetParameter(_RATE, words_per_minute, 0)
    engine.library.espeak_SetParameter(_PITCH, pitch, 0)
    engine.spoken.clear()
    content = text.encode() + b"\0"
    if engine.library.espeak_Synth(content, len(content), 0, _BY_CHARACTER, 0, _UTF8, None, None):
        raise UserError(f"espeak-ng cannot speak '{text}'")
    samples = np.concatenate(engine.spoken).astype(np.float32) if engine.spoken else np.zeros(0, np.float32)
    return Audio(samples / np.float32(2**15), engine.sample_rate)
