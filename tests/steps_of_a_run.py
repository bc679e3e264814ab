"""The training program without the pictures before and after, to be started as several processes."""

from d2f_jax import program, train

if __name__ == "__main__":
    train.finish = lambda *_: None
    program.run(train.main)
