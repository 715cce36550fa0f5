"""What the package says of files and settings that cannot be used, in Chinese: what the form can cause.

Where a sentence is not among these it stays English, which is more than nothing.
"""

import re

from stableavatar.apps.web.texts import TEXTS, Language

_PORTRAIT = r"portrait[^:]*: "
_SENTENCES: tuple[tuple[str, str], ...] = (
    (
        r"(?P<name>width|height) (\d+) is not a multiple of (\d+); the nearest is (\d+)",
        r"\1 \2 不是 \3 的倍数；最接近的是 \4",
    ),
    (r"give both width and height, or neither", "宽和高要么都填，要么都不填"),
    (r"(\d+x\d+) are (\d+) pixels: (\d+) at most", r"\1 共 \2 像素，最多 \3"),
    (r"(?P<name>.+?) (\S+) is too small: more than (\S+)", r"\1 \2 太小，须大于 \3"),
    (r"(?P<name>.+?) (\S+) is too (?:small|large): (\S+) (?:or more|at most)", r"\1 \2 超出范围，界限为 \3"),
    (r"(?P<name>.+?) (\S+) is not a number", r"\1 \2 不是数字"),
    (_PORTRAIT + r"not a picture, .*", "肖像：不是图片，或文件开头已损坏。请使用 JPEG、PNG 或 WebP。"),
    (_PORTRAIT + r"cut off or damaged .*", "肖像：文件不完整或已损坏。请重新获取或另存。"),
    (_PORTRAIT + r"HEIC .*", "肖像：不支持 HEIC。请另存为 JPEG 或 PNG。"),
    (
        _PORTRAIT + r"(.*) megapixels, at most (.*) megapixels are accepted.*",
        r"肖像：\1 百万像素，最多 \2。请缩小。",
    ),
    (
        _PORTRAIT + r"(\d+x\d+) pixels are too few, it needs at least (\d+) .*",
        r"肖像：\1 像素太小，每边至少 \2。",
    ),
    (_PORTRAIT + r".*", "肖像：文件无法使用。请另存为 JPEG 或 PNG。"),
    (r"the speech is longer than (\S+) s.*", r"录音超过 \1 秒的上限。请缩短，或填写时长。"),
    (r"the sound is longer than (\S+) s.*", r"录音超过 \1 秒的上限。"),
    (r"the speech has (\d+) samples a second: (\d+) at least", r"录音每秒只有 \1 个采样，至少需要 \2。"),
    (
        r"(?:recording|speech)[^:]*: a start at (\S+) s lies after its end, it has only (\S+) s\. .*",
        r"起点 \1 秒超过了录音的结尾，录音只有 \2 秒。请填写更早的起点。",
    ),
    (
        r"(?:recording|speech)[^:]*: has no sound, only pictures.*",
        "录音里没有声音，只有画面。请选择有声音的文件。",
    ),
    (
        r"(?:recording|speech)[^:]*: cut off, .* only (\S+) s could be read.*duration of at most (\S+) s\.",
        r"录音不完整，只能读取 \1 秒。请重新获取文件，或将长度设为最多 \2 秒。",
    ),
    (r"(?:recording|speech)[^:]*: .*", "录音无法读取。请另存为 WAV 后重试。"),
    (r"(\S+) s are shorter than a frame: .*", r"\1 秒不足一帧，请提供更长的录音。"),
    (r"start (\S+) is a place in the speech: .*", r"起点 \1 是录音中的位置：请提供录音，或留空。"),
    (r"an overlap of (\d+) .*choose 2 to (\d+)", r"重叠 \1 不适合此模型的窗口：请选 2 至 \2。"),
    (r"this model has no (\S+) size; .*", r"此模型没有 \1 画幅，请另选，或填写宽和高。"),
    (r"the files could not be read within (\S+) s.*", r"\1 秒内未能读完文件。请发送较小的 JPEG 和 WAV。"),
    (r"one of the files cannot be read.*", "有一个文件无法读取。请将肖像存为 JPEG 或 PNG，录音存为 WAV。"),
    (
        r"(\d+) of your videos are waiting already.*",
        r"您已有 \1 个视频在排队。请等其中一个完成，或删除一个。",
    ),
    (r"Too many videos are waiting.*", "排队的视频太多，请稍后再试。"),
    (r"(\d+) videos of yours are kept.*", r"您已保存 \1 个视频，请先删除一些。"),
    (
        r"Your videos, and what you sent for them, take (.*) GB.*",
        r"您的视频和上传的文件已占用 \1 GB，请先删除一些。",
    ),
    (r"Many files (?:of yours )?are being looked at.*", "正在检查的文件较多，请稍后再试。"),
    (
        r"(\d+x\d+), this model's size, are (\d+) pixels: (\d+) .*",
        r"此模型的画幅 \1 共 \2 像素，最多 \3。请填写较小的宽和高。",
    ),
    (r"the files take too much memory.*", "文件占用内存过多。请发送较小的图片。"),
    (r"the server ends: .*", "页面正在关闭，请稍后重新发送。"),
    (
        r"\S+: (\S+) cannot be reached, and there is no complete copy here.*",
        r"无法连接 \1。请检查网络，或由运行本页面者用 HF_ENDPOINT 指定镜像。",
    ),
    (r"\S+: access must be asked for at (\S+); .*", r"需先在 \1 申请访问，并设置 HF_TOKEN。"),
    (r"\S+: no such repository at .*", "找不到该权重仓库，请检查名称或设置 HF_TOKEN。"),
    (r"\S+: has no revision .*", "该权重仓库中没有这个版本。"),
    (r"\S+: HF_HUB_OFFLINE forbids the network.*", "HF_HUB_OFFLINE 禁止联网，本机也没有副本。"),
    (r"\S+: a file is missing at .*", "仓库中缺少文件，请稍后再试。"),
    (r"\S+: \S+ answered (\d+); .*", r"服务器返回 \1，请稍后再试或设置 HF_TOKEN。"),
    (r".*: cannot be written \((.*)\)", r"无法写入文件（\1）。"),
    (r"there is too little memory for this.*", "内存不足。请减小画面，或缩短视频。"),
    (r"The program that makes videos has met a fault .*", "生成程序出现故障，详见其日志。"),
    (
        r"The program that makes videos broke off (\d+) times .*",
        r"生成程序在此视频上中断了 \1 次，可能是内存不足。",
    ),
)


def in_words(sentence: str, language: Language) -> str:
    """A sentence of the package as somebody with this language is to read it."""
    if language == "zh":
        for pattern, words in _SENTENCES:
            if found := re.fullmatch(pattern, sentence, re.DOTALL):
                name = found.groupdict().get("name")
                field = TEXTS.get((name or "").replace(" ", "_"))
                said = found.expand(words)
                return said if name is None or field is None else said.replace(name, field[1], 1)
    return sentence
