"""Everything that the page says, in English and in Chinese, by name."""

from typing import Literal, get_args

Language = Literal["en", "zh"]
LANGUAGES: tuple[Language, ...] = get_args(Language)

# In this order: English, Chinese.
TEXTS: dict[str, tuple[str, str]] = {
    "title": ("StableAvatar", "StableAvatar"),
    "subtitle": (
        "One portrait and a recording become a video of that person saying it, of any length.",
        "一张肖像和一段录音，变成这个人说话的视频，长度不限。",
    ),
    "other_language": ("中文", "English"),
    "consent": (
        "Use portraits and voices only of people who agreed, and say that the video is made.",
        "请只使用已获同意的肖像和声音，并注明视频由程序生成。",
    ),
    # Tabs.
    "tab_talk": ("Talk", "说话"),
    "tab_audio": ("Extract audio", "提取音频"),
    "tab_vocals": ("Separate vocals", "分离人声"),
    "tab_gallery": ("Gallery", "作品"),
    "tab_models": ("Models", "模型"),
    # Talk.
    "portrait": ("Portrait", "肖像"),
    "speech": ("Speech", "语音"),
    "prompt": ("Description", "画面描述"),
    "prompt_help": (
        "First frame – behaviour – background, in a sentence or two.",
        "首帧 – 动作 – 背景，一两句话。",
    ),
    "prompt_example": (
        "A woman with short hair in a blue jacket – she is talking and smiling – a wall of books",
        "一位短发女子穿着蓝色外套 – 她微笑着说话 – 一面书墙",
    ),
    "example": ("Try an example", "试试示例"),
    "example_prompt": (
        "A woman with short hair in a space suit – she is talking – a flag",
        "一位短发女子穿着宇航服 – 她在说话 – 背景是一面旗",
    ),
    "shape": ("Shape", "画面形状"),
    "shape_auto": ("as the picture", "与图片一致"),
    "shape_square": ("square", "方形"),
    "shape_tall": ("tall", "竖屏"),
    "shape_wide": ("wide", "横屏"),
    "make": ("Make the video", "生成视频"),
    "make_another": ("Queue another video", "再排一个视频"),
    "stop": ("Stop", "停止"),
    "download": ("Download the video", "下载视频"),
    "video": ("Video", "视频"),
    "nothing_yet": (
        "The video plays here while it is made.",
        "视频会在生成的同时在此播放。",
    ),
    "small_model": (
        "This is tiny, the small model that comes with the package: 128×128 pixels, for trying things out. "
        "The published weights make sharp videos; see Models.",
        "当前为随软件附带的小模型 tiny：128×128 像素，仅供试用。清晰的视频需要公开权重，见模型页。",
    ),
    # Advanced.
    "advanced": ("Advanced", "高级设置"),
    "steps": ("Steps", "步数"),
    "steps_help": (
        "{default} suits this model. Fewer are faster and blur lips and teeth; many more change little.",
        "推荐 {default}。更少更快，但嘴唇和牙齿会模糊；更多变化不大。",
    ),
    "text_scale": ("Strength of the description", "描述强度"),
    "text_scale_help": (
        "{default} suits this model. Higher follows the words more closely and burns colours.",
        "推荐 {default}。更高更贴合文字，但颜色会过饱和。",
    ),
    "audio_scale": ("Strength of the speech", "语音强度"),
    "audio_scale_help": (
        "{default} suits this model. Lower mumbles, higher exaggerates the mouth.",
        "推荐 {default}。过低口型含糊，过高口型夸张。",
    ),
    "overlap": ("Overlap of windows", "窗口重叠"),
    "overlap_help": (
        "{default} suits this model. More is smoother and slower; less may show a seam.",
        "推荐 {default}。更多更平滑也更慢；更少可能出现接缝。",
    ),
    "seed": ("Seed", "随机种子"),
    "seed_help": (
        "The same number and settings repeat a video. Empty: another one each time.",
        "相同的数字和设置会重复同一视频。留空则每次不同。",
    ),
    "order": ("First frames at once", "尽快出首帧"),
    "order_help": (
        "Suits nearly always: the first frames come after one window. Without it, as the method was "
        "published, they come after the work of {windows} windows, of a short video when it is nearly done; "
        "a little smoother.",
        "一般应勾选：第一个窗口完成后立即出画面。不勾选则为原方法：要等约 {windows} 个窗口的计算，"
        "短视频几乎到完成时才出画面，略更平滑。",
    ),
    "width": ("Width", "宽"),
    "height": ("Height", "高"),
    "size_help": (
        "Multiples of 16; empty: by the shape. Far from the trained sizes faces distort.",
        "16 的倍数；留空则按形状。远离训练尺寸时面部会变形。",
    ),
    "size_of_picture": ("From the picture", "按图片"),
    "swap": ("Swap", "互换"),
    "fit": ("Fit of the portrait", "肖像适配"),
    "fit_help": (
        "Crop suits nearly always and cuts the edges; pad keeps all of it with a border, stretch distorts "
        "it.",
        "一般用裁剪，会切去边缘；填充保留全部并加边，拉伸会变形。",
    ),
    "fit_crop": ("crop", "裁剪"),
    "fit_pad": ("pad", "填充"),
    "fit_stretch": ("stretch", "拉伸"),
    "start": ("Start in the recording [s]", "录音起点 [秒]"),
    "duration": ("Length [s]", "长度 [秒]"),
    "duration_help": (
        "Empty: as long as the recording. Try 3 seconds first.",
        "留空则与录音等长。建议先试 3 秒。",
    ),
    "overlap_weights": ("Weights where windows overlap", "重叠处权重"),
    "overlap_weights_help": (
        "Even suits nearly always; rising gives the later window more towards its middle.",
        "一般用均匀；渐增则越靠后一窗口中部权重越大。",
    ),
    "overlap_weights_uniform": ("even", "均匀"),
    "overlap_weights_log": ("rising", "渐增"),
    "speech_normalisation": ("Loudness is evened out", "音量均衡"),
    "speech_normalisation_help": (
        "In every window, as the method was published: mouths may move in pauses. Over the whole recording: "
        "calmer pauses, and quiet passages move the mouth less.",
        "逐窗口均衡为原方法，停顿处口型可能微动；按整段录音均衡则停顿更安静，但轻声处口型也更小。",
    ),
    "speech_normalisation_window": ("in every window", "逐窗口"),
    "speech_normalisation_recording": ("over the recording", "按整段录音"),
    "guidance": ("Guidance", "引导方式"),
    "guidance_help": (
        "By three predictions, as the method was published, or audio-native: try that where the mouth lags "
        "behind. Its strengths are others, and are put there.",
        "三路预测为原方法；口型跟不上时可试音频原生，其强度含义不同，会自动填入。",
    ),
    "guidance_three-branch": ("three predictions", "三路预测"),
    "guidance_audio-native": ("audio-native", "音频原生"),
    "negative_prompt": ("What is not to be seen", "不希望出现的内容"),
    "negative_prompt_help": (
        "Empty: the model's own, which suits it. What stands here is kept away from more the stronger the "
        "description is.",
        "留空用模型自带的（推荐）。描述强度越大，越避开这里的内容。",
    ),
    "fps": ("Frames a second", "帧率"),
    "fps_help": (
        "25 is what the models know best; far from it mouths move too fast or too slowly.",
        "模型最熟悉 25；偏离太多口型会过快或过慢。",
    ),
    "start_help": (
        "Seconds of the recording to leave out at its beginning.",
        "从录音开头跳过的秒数。",
    ),
    "waits_for_room": ("Waits until there is room on this machine", "等待本机腾出空间"),
    "no_room": (
        "There is no room for more videos on this machine now. Delete some in the gallery, or try again "
        "later.",
        "本机空间不足。请在作品中删除一些，或稍后再试。",
    ),
    "step_cache": ("Leave out steps that change little", "跳过变化小的步"),
    "step_cache_help": (
        "0 leaves out none; 0.05 to 0.1 is faster and less exact.",
        "0 表示不跳过；0.05 到 0.1 更快但精度略低。",
    ),
    "quality": ("Quality of the file", "文件质量"),
    "quality_help": (
        "18 looks like the frames; higher numbers make smaller and coarser files.",
        "18 与原画面无异；数字越大文件越小、越粗糙。",
    ),
    # Progress.
    "queued_first": ("Next in the queue.", "下一个就是你。"),
    "queued_second": ("One video before yours.", "前面还有 1 个视频。"),
    "queued": ("{count} videos before yours.", "前面还有 {count} 个视频。"),
    "looking": ("Looking at your files.", "正在检查您的文件。"),
    "starting": ("Reading portrait, speech and description.", "正在读取肖像、语音和描述。"),
    "loading": ("The model is being loaded.", "正在加载模型。"),
    "making": (
        "Window {window} of {windows}, step {step} of {steps}; {frames} of {total} frames",
        "窗口 {window}/{windows}，第 {step}/{steps} 步；{frames}/{total} 帧",
    ),
    "left": ("{time} left", "还剩 {time}"),
    "seconds": ("{count} s", "{count} 秒"),
    "minutes": ("{count} min", "{count} 分钟"),
    "hours": ("{count} h", "{count} 小时"),
    "stopping": ("Stopping after this step.", "将在这一步后停止。"),
    "completed": ("Done: {seconds} s of video, {size}.", "完成：{seconds} 秒视频，{size}。"),
    "cancelled": (
        "Stopped. What was made until then is kept.",
        "已停止。此前生成的部分已保留。",
    ),
    "cancelled_empty": ("Stopped before the first frame.", "在第一帧之前已停止。"),
    "failed": ("This did not work: {error}", "未能完成：{error}"),
    "no_portrait": ("Choose a portrait first.", "请先选择一张肖像。"),
    "no_speech": (
        "Give a recording, or a length for a silent video (under Advanced).",
        "请提供录音，或在高级设置中填写无声视频的长度。",
    ),
    "no_number": ("{name}: {value} is no number that can be used here.", "{name}：{value} 不是可用的数字。"),
    # Tools.
    "recording_or_video": ("A video or a recording", "视频或录音"),
    "extract": ("Extract the audio", "提取音频"),
    "extract_help": (
        "The sound of a video as mono WAV at 16 kHz, as the model hears it.",
        "将视频的声音提取为 16 kHz 单声道 WAV，与模型听到的一致。",
    ),
    "separate": ("Separate the voice", "分离人声"),
    "separate_help": (
        "The voice without the music, as stereo WAV at 44.1 kHz. Give it as speech where somebody sings.",
        "去掉音乐后的人声，44.1 kHz 立体声 WAV。歌唱录音请先用此功能。",
    ),
    "no_network": (
        "This needs a network for vocals, 67 MB. Get it under Models, or start the page with --vocals FILE.",
        "需要人声分离网络（67 MB）。请在模型页下载，或用 --vocals FILE 启动。",
    ),
    "no_network_here": (
        "This needs a network for vocals, which whoever runs this page has not put here.",
        "需要人声分离网络，本页面的运行者尚未安装。",
    ),
    "no_onnxruntime": (
        "This needs onnxruntime, which whoever runs this page installs with: pip install onnxruntime",
        "需要 onnxruntime，由本页面的运行者安装：pip install onnxruntime",
    ),
    "result": ("Result", "结果"),
    "broken_file": (
        "This file could not be read to its end, or not in time. Save it as WAV or MP4, or send less of it.",
        "无法读完该文件，或耗时过长。请另存为 WAV 或 MP4，或发送较短的文件。",
    ),
    "no_file": ("Choose a file first.", "请先选择文件。"),
    # Gallery.
    "refresh": ("Refresh", "刷新"),
    "gallery_empty": ("What you make will be here.", "生成的视频会显示在这里。"),
    "older": ("Show older ones", "显示更早的作品"),
    "in_the_making": ("in the making", "生成中"),
    "use_again": ("Use these again", "再次使用"),
    "delete": ("Delete", "删除"),
    "delete_really": ("Delete it for good", "确认永久删除"),
    "keep": ("Keep it", "保留"),
    "settings": ("Settings", "设置"),
    "aspect": ("Shape", "画面形状"),
    "order_chosen": ("Order of the windows", "窗口顺序"),
    "order_chosen_wavefront": ("from the beginning on", "从头到尾"),
    "order_chosen_causal": ("first frames at once", "尽快出首帧"),
    "order_chosen_lockstep": ("all at the end", "最后一并完成"),
    "size": ("Size of the model", "模型规模"),
    "model": ("Model", "模型"),
    "lora": ("LoRA files", "LoRA 文件"),
    "dtype": ("Precision", "精度"),
    "version": ("Release", "版本"),
    "preset": ("Preset of the encoder", "编码预设"),
    "frame_count": ("Frames", "帧数"),
    "first_frame_seconds": ("First frame after [s]", "首帧用时 [秒]"),
    "window": ("Window [frames]", "窗口 [帧]"),
    "batch_windows": ("Windows at once", "同时计算的窗口"),
    "decoder_device": ("Device of the decoder", "解码设备"),
    "decoder_tiling": ("Decoded in tiles", "分块解码"),
    "no_audio": ("Without speech the model hears", "无语音分支"),
    "compat": ("As the published code", "与公开代码一致"),
    "by_hand": ("By a program", "由程序设置"),
    "used_again": ("Portrait, speech and settings are in the tab Talk.", "肖像、语音和设置已填入说话页。"),
    # Models.
    "model_in_use": ("In use", "正在使用"),
    "models_here": ("On this machine", "本机已有"),
    "get_weights": ("Get the published weights", "下载公开权重"),
    "get_help": (
        "More than 20 GB. An interrupted download goes on with the files that are not whole. At the end this "
        "page says how to start it with them.",
        "超过 20 GB。中断后会保留已完整的文件。完成后本页会给出用它启动的命令。",
    ),
    "variant": ("Videos that it makes best", "最擅长的画幅"),
    "variant_square": ("square, 512×512", "方形 512×512"),
    "variant_rec-vec": ("tall or wide, 480×832", "竖屏或横屏 480×832"),
    "model_published": ("Published weights", "公开权重"),
    "comes_along": ("comes with the package", "随软件附带"),
    "model_ready": ("ready", "已就绪"),
    "model_missing": ("not here, or not all of it", "没有，或不完整"),
    "vocal_separator": ("Network for vocals", "人声分离网络"),
    "vocals_done": ("Complete: vocals can be separated.", "完成：可以分离人声了。"),
    "get_vocals": ("Get the vocal separator alone", "仅下载人声分离网络"),
    "download_stopped": ("Stopped. What was whole is kept.", "已停止。已完整的文件会保留。"),
    "download_asks": ("Asking which files there are", "正在查询文件列表"),
    "download_comes": ("{done} of {total} GB", "{done} / {total} GB"),
    "download_checks": ("Comparing the files with their check sums", "正在校验文件"),
    "fault": (
        "The program has met a fault of its own; whoever runs this page finds more in its log.",
        "程序遇到内部错误，详情见运行本页面者的日志。",
    ),
    "download_going": (
        "Another download is going on; this is how far it is.",
        "已有另一个下载正在进行，进度如下。",
    ),
    "no_downloads": ("Who runs this page gets the weights.", "权重由运行本页面者下载。"),
    "stopped": ("Stopped.", "已停止。"),
    "download_lost": (
        "The download broke off. Start it again: files that are whole are kept.",
        "下载中断。请重新开始，已完整的文件会保留。",
    ),
    "download_done": (
        "Complete. Start the page as before, with these options added:\n\n`{options}`",
        "完成。请按原来的方式重新启动页面，并加上：\n\n`{options}`",
    ),
    # Refusals before the page.
    "own_name_alone": (
        "This page answers to its own name alone. Start it with --allow-host NAME for another.",
        "本页面只接受自己的名称。如需其他名称，请用 --allow-host NAME 启动。",
    ),
    "no_room_for_file": ("There is no room for this file.", "没有空间存放此文件。"),
    "many_arrive": (
        "Many files are being sent. Try again in a moment.",
        "正在上传的文件较多，请稍后再试。",
    ),
    "too_large": ("This is more than the page takes.", "超出本页面可接收的大小。"),
}


class Texts:
    """What the page says in one language: `texts["make"]`, `texts("queued", count=3)`."""

    def __init__(self, language: Language) -> None:
        self.language = language
        self._column = LANGUAGES.index(language)

    def __getitem__(self, name: str) -> str:
        return TEXTS[name][self._column]

    def __call__(self, name: str, /, **values: object) -> str:
        """A text with values in it."""
        return self[name].format(**values)

    def time(self, seconds: float) -> str:
        """A length of time in words."""
        if seconds < 100:
            return self("seconds", count=max(round(seconds), 1))
        if seconds < 6000:
            return self("minutes", count=round(seconds / 60))
        return self("hours", count=round(seconds / 3600, 1))


def preferred(accept_language: str) -> Language:
    """The language of a browser's Accept-Language header: Chinese where it is named before English."""
    for part in accept_language.lower().split(","):
        tag = part.partition(";")[0].strip()
        if tag.startswith("zh"):
            return "zh"
        if tag.startswith("en"):
            return "en"
    return "en"
