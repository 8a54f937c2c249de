"""What a person should know of a request that runs all the same: words, sizes and settings that will not do
what they seem to. Knows what a model's folder says of its training; refuses nothing.
"""

from __future__ import annotations

from chitu_diffusion.errors import counted
from chitu_diffusion.models.spec import ModelSpec
from chitu_diffusion.models.wan.text_encoder import TextEncoder
from chitu_diffusion.pipelines.request import guidance_pair, is_cut, stages_of
from chitu_diffusion.task import DiffusionUserParams

_FAR = 1.5
"""Times a trained height, width or number of frames: what lies beyond is far from the training."""
_NAMED = 12
"""Words that a note names, of those that are not known and of those that are."""


def request_notes(
    asked: DiffusionUserParams, resolved: DiffusionUserParams, spec: ModelSpec, encoder: TextEncoder
) -> list[str]:
    """Sentences on a request, none where all of it will be followed.

    Args:
        asked, resolved: the request, before and after the model's own values were filled in.
        encoder: the model's; its tokenizer is asked.
    """
    texts = {"prompt": resolved.prompt}
    sampled = spec.with_recipe(resolved.sampler_recipe)
    said = (sampled.shift_note(resolved.shift), sampled.recipe_note(guidance_pair(resolved.guidance_scale)))
    notes = [note for note in said if note]
    if (resolved.image or resolved.video) and asked.height is asked.width is None:
        size = f"{resolved.width}x{resolved.height}"
        notes.append(
            f"{size} is the {'image' if resolved.image else 'video'}'s shape at the model's own area"
        )
    for name, image in (("image", resolved.image), ("last image", resolved.last_image)):
        if image is not None:
            cut = is_cut(spec, resolved)
            notes += image.notes(resolved.height or 0, resolved.width or 0, name, is_cut=cut)
    if resolved.video:
        notes += resolved.video.notes(resolved.num_frames or 1, resolved.height or 0, resolved.width or 0)
    if max(guidance_pair(resolved.guidance_scale)) > 1:
        texts["negative prompt"] = resolved.negative_prompt or ""
    elif asked.negative_prompt:
        notes.append(
            "the negative prompt is not used: without guidance the prompt's branch runs alone; use a "
            "guidance_scale above 1"
        )
    for name, text in texts.items():
        tokens = encoder.count_tokens(text)
        if tokens > encoder.max_tokens:
            notes.append(
                f"the {name} has {tokens} tokens and {spec.name} reads {encoder.max_tokens}: its end is cut "
                "off; use a shorter one"
            )
        unknown = encoder.unknown_words(text, spec.words)
        if unknown:
            known = spec.words[:_NAMED]
            more = f"; it knows {', '.join(known)} and {len(spec.words) - len(known)} more words"
            notes.append(
                f"words of the {name} that {spec.name} does not know: {', '.join(unknown[:_NAMED])}"
                f"{' ...' if len(unknown) > _NAMED else ''}{more if known else ''}"
            )
    return notes + _size_notes(resolved, spec)


def _size_notes(resolved: DiffusionUserParams, spec: ModelSpec) -> list[str]:
    last = stages_of(resolved)[-1]
    size = (last.height, last.width, resolved.num_frames or 1)

    def distance(trained: tuple[int, int, int]) -> float:
        return max(max(a / b, b / a) for a, b in zip(size, trained, strict=True))

    if not spec.trained_sizes or min(map(distance, spec.trained_sizes)) <= _FAR:
        return []
    height, width, frames = min(spec.trained_sizes, key=distance)
    return [
        f"{size[1]}x{size[0]} with {counted(size[2], 'frame')} lies far from what {spec.name} was trained "
        f"on, and may look worse; the nearest is {width}x{height} with {counted(frames, 'frame')}"
    ]
