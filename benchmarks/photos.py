"""The photographs that come with scikit-image, as what pictures are cropped from."""

from PIL import Image

from blipq_worker.bench.pictures import Pictures

NAMES = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "rocket")


def pictures(seed: int = 0) -> Pictures:
    """Distinct 1024x768 JPEGs of about 100 KB; no two seeds have one in common."""
    from skimage import data  # of the bench group, which tests of the sections do without

    arrays = [getattr(data, name)() for name in NAMES] + [data.stereo_motorcycle()[0]]
    return Pictures([Image.fromarray(each).convert("RGB") for each in arrays], seed)
