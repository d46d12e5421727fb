"""Training progress: the time left, and numbers in words."""

from deris_llm.training.callbacks import TimeLeft, as_words


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


def test_the_time_left_follows_recent_steps():
    clock = Clock()
    left = TimeLeft(clock)
    left.step()
    assert left.words(num_steps=100, num_evaluations=0) == "?"
    for _ in range(10):  # a slow start
        clock.wait(30)
        left.step()
    assert left.words(num_steps=100, num_evaluations=0) == "0:50:00"
    for _ in range(50):
        clock.wait(1)
        left.step()
    assert left.words(num_steps=100, num_evaluations=0) == "0:01:40"  # the mean since the start says 0:09:50
    assert left.words(num_steps=0, num_evaluations=0) == "0:00:00"


def test_evaluations_are_timed_on_their_own():
    clock = Clock()
    left = TimeLeft(clock)
    for _ in range(3):
        left.step()
        clock.wait(1)
    left.step()
    with left.evaluation():
        clock.wait(600)
    left.step()  # the step that contained the evaluation says nothing
    clock.wait(1)
    left.step()
    assert left.words(num_steps=100, num_evaluations=0) == "0:01:40"
    assert left.words(num_steps=100, num_evaluations=2) == "0:21:40"


def test_counts_are_whole_numbers():
    assert as_words({"mIoU": 71.428, "n_phrases": 10834.0}) == "mIoU 71.43, phrases 10,834"
