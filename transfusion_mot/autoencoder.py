"""The command `python -m transfusion_mot.autoencoder --config FILE`: train an image codec."""

from transfusion_mot.codec_training.train import main
from transfusion_mot.errors import exit_on_user_error

if __name__ == "__main__":
    with exit_on_user_error():
        main()
