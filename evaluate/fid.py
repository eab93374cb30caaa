"""Distance between a folder of real and one of generated images: FID and KID, or FD-EfficientNet without downloads.

    python evaluate/fid.py REAL_FOLDER GENERATED_FOLDER --output metrics.json

FID needs the Inception weights inception-2015-12-05.pt: downloaded once, or given with --inception-weights. Without
them (and with --features efficientnet) the distance is measured in the features of EfficientNet-Lite0 and called
FD-EfficientNet, which cannot be compared with any FID. Compare numbers only from as many images, and see
docs/evaluation.md for what else has to agree.
"""

import argparse
import logging
import sys

from transfusion_mot.errors import exit_on_user_error
from transfusion_mot.evaluation.features import image_distance, load_feature_network
from transfusion_mot.evaluation.images import default_num_workers, find_images, pick_device
from transfusion_mot.evaluation.report import metrics_table, save_metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "real",
        metavar="REAL_FOLDER",
        help="real images: those in its metadata.jsonl, else every .png, .jpg, .jpeg and .webp, in subfolders too",
    )
    parser.add_argument("generated", metavar="GENERATED_FOLDER", help="generated images, as many as possible")
    parser.add_argument("--features", choices=["auto", "inception", "efficientnet"], default="auto")
    parser.add_argument("--inception-weights", metavar="FILE", help="local path of inception-2015-12-05.pt")
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help="cut the centre square of every image and resize it to this size first, as training does; without it "
        "images are taken as they are, so both folders should be of one size",
    )
    parser.add_argument("--batch-size", type=int, help="images at a time (GPU 64, CPU 4); does not change the numbers")
    parser.add_argument("--num-workers", type=int, default=default_num_workers(), help="processes that decode images")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (cuda if there is one)")
    parser.add_argument("--output", metavar="FILE", help="also write the numbers as JSON, with how they were measured")
    arguments = parser.parse_args()
    real, generated = find_images(arguments.real), find_images(arguments.generated)
    network = load_feature_network(arguments.features, pick_device(arguments.device), arguments.inception_weights)
    metrics = image_distance(
        real, generated, network, arguments.batch_size, arguments.num_workers, arguments.image_size
    )
    print(metrics_table(metrics))
    if arguments.output:
        save_metrics(metrics, arguments.output, sys.argv)


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    logging.getLogger("transfusion_mot").setLevel(logging.INFO)
    with exit_on_user_error():
        main()
