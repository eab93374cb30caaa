"""Captions of scenes, from a few words to sentences."""

from collections.abc import Sequence
from dataclasses import replace

from transfusion_mot.data.draws import Draws
from transfusion_mot.data.scene_objects import scene_objects, with_article
from transfusion_mot.data.scenes import NUMBERS, OPPOSITE, Group, Relation, Scene
from transfusion_mot.data.sprites import Sprite

_WORDINGS: dict[Relation, tuple[str, ...]] = {
    "left of": ("{a} left of {b}", "{a} to the left of {b}", "{a} on the left and {b} on the right"),
    "right of": ("{a} right of {b}", "{a} to the right of {b}", "{a} on the right and {b} on the left"),
    "above": ("{a} above {b}", "{a} over {b}"),
    "below": ("{a} below {b}", "{a} under {b}"),
    "next to": ("{a} next to {b}", "{a} beside {b}"),
    "and": ("{a} and {b}",),
}
_NOUNS = {thing.noun: thing.nouns for thing in scene_objects()}


def captions_of(scene: Scene, sprites: Sequence[Sprite], draws: Draws) -> tuple[str, ...]:
    """Captions with the same content in different words; a caption may be listed twice to be more frequent.

    Args:
        scene: The scene to describe.
        sprites: The drawings in the scene.
        draws: Random choices of wordings and nouns.
    """
    if scene.is_framed:
        return _of_framed(scene.groups[0], sprites[scene.groups[0].sprite], draws)
    named = []
    for group in scene.groups:
        nouns = _NOUNS[group.noun]
        named.append(replace(group, noun=draws.pick(nouns)) if draws.chance(0.4) else group)
    ground = scene.background.words
    terse, phrase = _said(named, scene.relation, draws)
    where = f" {scene.place}" if scene.place else ""
    on = f" on {with_article(ground)}" if ground else ""
    whole = f"{phrase}{where}{on}"
    is_many = phrase.split()[0] in NUMBERS.values()
    sentence = draws.pick(
        (
            f"{whole[0].upper()}{whole[1:]}.",
            f"A picture of {whole}.",
            f"There {'are' if is_many else 'is'} {whole}.",
            f"a drawing of {whole}",
        )
    )
    return (f"{terse}{where}{f', {ground}' if ground else ''}", whole, whole, sentence)


def _of_framed(group: Group, sprite: Sprite, draws: Draws) -> tuple[str, ...]:
    exact = f"{sprite.style} emoji of {sprite.name}"
    if group.noun not in _NOUNS:
        return (group.noun, f"{sprite.style} {group.noun}", exact)
    named = replace(group, noun=draws.pick(_NOUNS[group.noun]))
    return (named.terse, named.terse, named.phrase, replace(named, style=sprite.style).phrase, exact)


def _said(groups: Sequence[Group], relation: Relation, draws: Draws) -> tuple[str, str]:
    """Groups in their relation => (without articles, with articles)."""
    if len(groups) == 1:
        return groups[0].terse, groups[0].phrase
    if len(groups) == 3:
        ordered = draws.some(groups, 3)
        terse, phrase = [group.terse for group in ordered], [group.phrase for group in ordered]
        return ", ".join(terse), f"{phrase[0]}, {phrase[1]} and {phrase[2]}"
    first, second = groups
    # "a left of b" is the same as "b right of a".
    if draws.chance(0.5):
        first, second, relation = second, first, OPPOSITE.get(relation, relation)
    wording = draws.pick(_WORDINGS[relation])
    return (
        _WORDINGS[relation][0].format(a=first.terse, b=second.terse),
        wording.format(a=first.phrase, b=second.phrase),
    )
