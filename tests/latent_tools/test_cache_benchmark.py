from cache_helpers import NumberReader, options, write_photos

from benchmarks.cache_rates import cache_rates
from first_stage.data import open_source


def test_both_rates_are_of_all_images(tmp_path):
    write_photos(tmp_path / "data", 12)
    seen = []

    class Counting(NumberReader):
        def encode(self, images, return_dict=True):
            if images.shape[-1] == 16:
                seen.append(len(images))
            return super().encode(images)

    source = open_source(str(tmp_path / "data"))
    rates = cache_rates(Counting(), source, options(batch_size=5), folder=tmp_path)
    assert seen == [5, 5, 2] * 3  # warm, encode only, end to end
    assert rates.encode_only > 0
    assert abs(rates.share - rates.end_to_end / rates.encode_only) < 1e-12
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
