"The checks of the exercises: what they say to an untouched stub, a right answer, a usual mistake and a new one."
import math
import numpy as np, pytest, torch
from distillbook.lab.exercises import Exercise, course_exercises, problems, same

COURSE = course_exercises()

double = Exercise("double", lambda x: 2*x, {"square": (lambda x: x*x, "you squared it."), "half": (lambda x: x/2, "you halved it.")}, [(3.,), (5.,)])


# -- equal enough ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("a, b", [(1, 1.0), (0.1 + 0.2, 0.3), (1e6, 1e6 + 1), ([1, (2, 3)], (1, [2, 3])), ({"a": 1.}, {"a": 1}), ("x", "x"), (math.nan, math.nan),
                                  (math.inf, math.inf), (torch.ones(2), np.ones(2)), (torch.tensor(2.), 2), (np.float64(2), 2)])
def test_equal(a, b): assert same(a, b) and same(b, a)

@pytest.mark.parametrize("a, b", [(1, 1.01), (True, 1), ("1", 1), ([1], [1, 1]), ({"a": 1}, {"b": 1}), (None, 0), (math.nan, 1.), (math.inf, 1e308),
                                  (torch.ones(1, 3), torch.ones(3, 1)), (np.ones((1, 2)), np.ones((2, 1))), (torch.ones(3), torch.ones(2))])
def test_different(a, b): assert not same(a, b) and not same(b, a)


# -- the four answers --------------------------------------------------------------------------------------------------
def unfinished(x): raise NotImplementedError

@pytest.mark.parametrize("stub", [lambda x: None, lambda x: ..., lambda x: NotImplemented, unfinished])
def test_an_untouched_stub_is_not_tried_yet(stub, capsys):
    outcome = double(stub)
    assert (outcome.tried, outcome.right, capsys.readouterr().out) == (False, False, "not tried yet\n")

def test_a_right_answer(capsys): assert double(lambda x: x + x).right and capsys.readouterr().out == "right\n"

def test_a_usual_mistake_is_named():
    outcome = double(lambda x: x**2)
    assert (outcome.right, outcome.mistake, outcome.message) == (False, "square", "`double(3)` gave 9: you squared it.")

def test_a_new_mistake_shows_the_first_case_that_differs():
    assert double(lambda x: 6. if x == 3 else 0.).message == "`double(5)` gave 0, expected 10"

def test_an_exception_never_leaves_the_check():
    assert double(lambda x: x / 0).message.startswith("`double(3)` raised ZeroDivisionError")
    assert not double("not a function").right

def test_a_right_answer_may_be_an_error():
    check = Exercise("root", math.sqrt, {}, [(4.,), (-1.,)])
    def careless(x): return abs(x)**0.5
    assert check(math.sqrt).right and "expected an error (ValueError)" in check(careless).message

def test_a_careless_function_cannot_spoil_the_cases():
    check = Exercise("largest", max, {}, [([1, 3, 2],), ([5, 4],)])
    def spoils(values): values.sort(); return values.pop()
    assert check(spoils).right and check(max).right and check.cases[0] == ([1, 3, 2],)

def test_tensors_are_compared_by_shape_and_value():
    check = Exercise("ones", lambda n: torch.ones(n), {}, [(2,), (3,)])
    assert check(lambda n: torch.zeros(n) + 1).right and not check(lambda n: torch.ones(n, 1)).right


# -- the check of the checks -------------------------------------------------------------------------------------------
def test_problems_are_found():
    assert problems(double) == []
    blind = Exercise("double", double.right, double.wrong, [(0.,)])
    assert any("'square' from 'right'" in p for p in problems(blind)) and any("'half' from 'square'" in p for p in problems(blind))
    assert problems(Exercise("empty", double.right)) == ["empty has no cases"]

def test_the_course_has_exercises(): assert len(COURSE) >= 6

@pytest.mark.parametrize("name", COURSE)
def test_every_exercise_of_the_course_is_sound(name): assert problems(COURSE[name]) == []
