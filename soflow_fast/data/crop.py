"""What of an image is taken for a sample of another size or aspect ratio."""

from PIL import Image

from soflow_fast.size import Size, height_and_width


def centred(image: Image.Image, size: Size) -> Image.Image:
    """The largest centred part of an image that has the aspect ratio of a size, resized to it."""
    height, width = height_and_width(size)
    wide, high = image.size
    if wide * height > high * width:
        wide = max(1, round(high * width / height))
    else:
        high = max(1, round(wide * height / width))
    left, top = (image.width - wide) // 2, (image.height - high) // 2
    part = image.crop((left, top, left + wide, top + high))
    return part.resize((width, height), Image.Resampling.LANCZOS)


def centre_crop(image: Image.Image, size: Size) -> Image.Image:
    """The centre of an image as ADM takes it, and DiT, SiT and the published SoFlow code after it; here of any size.

    The image is halved, each pixel the mean of four, while it is at least twice as high and as wide; resized, bicubic,
    until no side is shorter and one is as long; and cropped.

    Args:
        image: of any size. size: of the result.
    """
    height, width = height_and_width(size)
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    factor = max(width / image.width, height / image.height)
    image = image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
