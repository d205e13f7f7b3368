"""What pictures are, to the code that reads sources of any media."""

from vqtok.sources.medium import Medium

SUFFIXES = frozenset(
    (".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm")
    + (".tga", ".tif", ".tiff", ".webp")
)
PICTURES = Medium("picture", "pictures", SUFFIXES, ".png, .jpg or .webp", "Image", "image_column", "digits")
