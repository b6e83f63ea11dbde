"""Requests of many callers in one batch: joining and leaving, waiting, cancelling, failing, and the pages of the cache."""

import asyncio
import contextlib
import gc
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_decoder import (
    RuleDecoder,
    by_hash,
    endless,
    generator_of,
    one_step_at_a_time,
    saying,
    small_model,
)
from torch import Tensor

from leangpt import Generator, SamplingParams
from leangpt.data.tokenizer import ByteTokenizer

GREEDY = SamplingParams(temperature=0.0)
FOR_EVER = SamplingParams(temperature=0.0, max_new_tokens=None)
SHORT = SamplingParams(max_new_tokens=6, seed=1, ignore_eos=True)
ENDLESS = {"max_seq_len": sys.maxsize}


def wait_until(condition: Callable[[], object]) -> None:
    while not condition():
        time.sleep(0.001)


class TestHandle:
    def test_it_gives_what_generate_gives(self):
        params = SamplingParams(max_new_tokens=9, seed=4, n=3, logprobs=1)
        handle = generator_of(by_hash).submit("Once", params)
        assert handle.result() == generator_of(by_hash).generate("Once", params)
        assert handle.done
        assert handle.result() == handle.result()

    def test_its_pieces_are_the_text_however_often(self):
        handle = generator_of(saying(*"a好!".encode())).submit("x", GREEDY)
        assert list(handle) == ["a", "好", "!"]
        assert list(handle) == ["a", "好", "!"]
        assert handle.result()[0].text == "a好!"

    def test_leaving_its_loop_does_not_end_the_work(self):
        handle = generator_of(saying(*b"abc")).submit("x", GREEDY)
        for _ in handle:
            break
        assert handle.result()[0].text == "abc"

    def test_it_waits_as_long_as_it_is_told(self):
        generator = generator_of(saying(*b"abc"))
        with one_step_at_a_time(generator.decoder):
            handle = generator.submit("x", GREEDY)
            with pytest.raises(TimeoutError, match="not done after 0.01 seconds"):
                handle.result(timeout=0.01)
            assert not handle.done
        assert handle.result(timeout=60)[0].text == "abc"

    def test_what_has_no_pieces(self):
        with pytest.raises(ValueError, match=r"n=2: use result\(\)"):
            iter(generator_of(by_hash).submit("x", SamplingParams(n=2, max_new_tokens=1)))
        without = Generator(RuleDecoder(by_hash))
        with pytest.raises(ValueError, match="needs a tokenizer"):
            iter(without.submit([1], SHORT))

    def test_wrong_arguments_raise_at_the_call(self):
        generator = generator_of(by_hash, max_seq_len=20)
        with pytest.raises(ValueError, match="max_new_tokens"):
            generator.submit("x", SamplingParams(max_new_tokens=20))
        with pytest.raises(TypeError, match="prompt"):
            generator.submit(5)
        [completion] = generator.submit("x" * 30, SHORT, overflow="truncate").result()
        assert len(completion.token_ids) == 6


class TestAsync:
    def test_pieces_and_results(self):
        async def work() -> tuple[list[str], list[str]]:
            generator = generator_of(saying(*b"hello"))
            handle = generator.submit("x", GREEDY)
            pieces = [piece async for piece in handle]
            completions = await generator.submit("x", SamplingParams(temperature=0.0, n=2))
            return pieces, [c.text for c in completions]

        assert asyncio.run(work()) == (list("hello"), ["hello", "hello"])

    def test_many_at_once(self):
        async def text(generator: Generator, seed: int) -> str:
            params = SamplingParams(max_new_tokens=12, seed=seed)
            return "".join([piece async for piece in generator.submit("Once", params)])

        async def work() -> list[str]:
            generator = generator_of(by_hash, max_batch_size=7)
            return await asyncio.gather(*(text(generator, seed) for seed in range(40)))

        params = [SamplingParams(max_new_tokens=12, seed=seed) for seed in range(40)]
        expected = generator_of(by_hash).generate(["Once"] * 40, params)
        assert asyncio.run(work()) == [c.text for c in expected]

    def test_the_loop_goes_on_meanwhile(self):
        """Nothing waits in the loop's thread: the steps are allowed by the loop itself."""

        async def work() -> str:
            generator = generator_of(saying(*b"abc"))
            with one_step_at_a_time(generator.decoder) as allow_step:
                task = asyncio.ensure_future(result(generator.submit("x", GREEDY)))
                while not task.done():
                    allow_step()
                    await asyncio.sleep(0)
                return await task

        async def result(handle) -> str:
            return (await handle)[0].text

        assert asyncio.run(work()) == "abc"

    def test_a_task_that_is_cancelled_may_drop_its_handle(self):
        async def work(generator: Generator) -> None:
            task = asyncio.ensure_future(wait_for_ever(generator))
            while not generator.decoder.num_rows:
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        async def wait_for_ever(generator: Generator) -> None:
            async for _ in generator.submit("x", FOR_EVER):
                pass

        generator = generator_of(endless, **ENDLESS)
        asyncio.run(work(generator))
        gc.collect()
        wait_until(lambda: generator.decoder.sequences == {})

    def test_errors_come_through(self):
        async def work(generator: Generator) -> None:
            with pytest.raises(RuntimeError, match="as the test wants it"):
                async for _ in generator.submit("x", SHORT):
                    pass

        generator = generator_of(by_hash)
        generator.decoder.fails_at_step, generator.decoder.error = 2, RuntimeError
        asyncio.run(work(generator))


class TestJoining:
    def test_a_request_joins_those_that_run(self):
        generator = generator_of(endless, **ENDLESS)
        with one_step_at_a_time(generator.decoder) as allow_step:
            first = generator.submit("x", FOR_EVER)
            allow_step()
            wait_until(lambda: len(generator.decoder.num_rows) == 1)
            second = generator.submit("yy", SamplingParams(temperature=0.0, max_new_tokens=3))
            for _ in range(6):
                allow_step()
            assert second.result()[0].text == "aaa"
            wait_until(lambda: len(generator.decoder.num_rows) == 7)
        # the step at which it was submitted may have been put together before
        assert generator.decoder.num_rows[:7] in ([1, 3, 2, 2, 1, 1, 1], [1, 1, 3, 2, 2, 1, 1])
        first.cancel()

    def test_they_start_in_the_order_they_came(self):
        read = []

        def rule(text: list[int]) -> Tensor:
            read.append(text[0])
            return by_hash(text)

        generator = generator_of(rule, max_batch_size=2)
        with one_step_at_a_time(generator.decoder):
            handles = [generator.submit([i, i], SHORT) for i in range(8)]
        for handle in handles:
            handle.result()
        assert list(dict.fromkeys(read)) == list(range(8))

    def test_the_prompts_of_a_generate_fill_the_batch_beside_a_stream(self):
        generator = generator_of(endless, **ENDLESS, max_batch_size=4)
        stream = generator.submit("x", FOR_EVER)
        params = SamplingParams(temperature=0.0, max_new_tokens=5)
        assert len(generator.generate(["ab"] * 100, params)) == 100
        assert generator.decoder.most_sequences == 4
        assert not stream.done
        stream.cancel()
        assert sum(generator.decoder.num_rows) >= 100 * 6

    def test_a_long_prompt_of_several_completions_is_read_beside_others(self):
        generator = generator_of(endless, **ENDLESS, max_batch_tokens=10)
        with one_step_at_a_time(generator.decoder) as allow_step:
            stream = generator.submit("x", FOR_EVER)
            several = generator.submit([66] * 30, SamplingParams(max_new_tokens=2, n=3, seed=1))
            allow_step()
            wait_until(lambda: len(generator.decoder.num_rows) == 1)
            for _ in range(8):
                allow_step()
            several.result()
            rows = generator.decoder.num_rows
            assert 10 in rows and max(rows) == 10
        stream.cancel()

    @pytest.mark.parametrize("num_threads", [8])
    def test_many_threads(self, num_threads):
        model = small_model(position="rotary")
        generator = Generator(model, ByteTokenizer(), max_batch_size=5, max_waiting=3)
        alone = Generator(model, ByteTokenizer())
        prompts = ["Once", "a", "你好", "x" * 30]
        params = [SamplingParams(max_new_tokens=9, temperature=1.0, seed=i) for i in range(4)]
        texts = [c.text for c in alone.generate(prompts, params)]
        scores = [s.total_logprob for s in alone.score(prompts)]
        ranked = [r.index for r in alone.rank("Once", prompts)]

        def work(i: int) -> None:
            rng = random.Random(i)
            for _ in range(4):
                k = rng.randrange(4)
                match rng.randrange(5):
                    case 0:
                        assert [c.text for c in generator.generate(prompts, params)] == texts
                    case 1:
                        assert "".join(generator.stream(prompts[k], params[k])) == texts[k]
                    case 2:
                        assert generator.submit(prompts[k], params[k]).result()[0].text == texts[k]
                    case 3:
                        found = [s.total_logprob for s in generator.score(prompts)]
                        assert found == pytest.approx(scores, abs=1e-9)
                    case 4:
                        assert [r.index for r in generator.rank("Once", prompts)] == ranked

        with ThreadPoolExecutor(num_threads) as pool:
            list(pool.map(work, range(num_threads)))
        assert generator.decoder._sequences == {}


class TestCancelling:
    def test_it_frees_the_memory_and_leaves_the_others_alone(self):
        generator = generator_of(endless, **ENDLESS)
        handles = [generator.submit("x", FOR_EVER) for _ in range(3)]
        other = generator.submit("x", SamplingParams(temperature=0.0, max_new_tokens=50))
        for handle in handles:
            assert next(iter(handle)) == "a"
            handle.cancel()
            assert handle.done
        assert other.result()[0].text == "a" * 50
        assert generator.decoder.sequences == {}
        for handle in handles:
            handle.cancel()
            with pytest.raises(CancelledError):
                handle.result()
            pieces = []
            with pytest.raises(CancelledError):
                for piece in handle:
                    pieces.append(piece)
            assert pieces and set(pieces) == {"a"}

    def test_one_that_waits(self):
        generator = generator_of(endless, **ENDLESS, max_batch_size=1)
        running = generator.submit("x", FOR_EVER)
        waiting = generator.submit("x", FOR_EVER)
        next(iter(running))
        waiting.cancel()
        with pytest.raises(CancelledError):
            waiting.result()
        assert list(waiting_pieces(waiting)) == []
        running.cancel()
        assert generator.decoder.sequences == {}

    @pytest.mark.parametrize("num_steps", range(7))
    def test_a_request_of_several_at_any_point(self, num_steps):
        """While its prompt is read, and while some of its completions run, are done, or wait."""
        generator = generator_of(by_hash, max_batch_size=2, max_batch_tokens=4)
        with one_step_at_a_time(generator.decoder) as allow_step:
            handle = generator.submit("x" * 10, SamplingParams(max_new_tokens=2, n=4))
            for _ in range(num_steps):
                allow_step()
            wait_until(lambda: len(generator.decoder.num_rows) == num_steps)
            canceller = threading.Thread(target=handle.cancel)
            canceller.start()
            allow_step()
        canceller.join()
        assert handle.done
        assert generator.decoder.sequences == {}
        assert generator._budget._num_promised == 0

    def test_when_nobody_holds_the_handle(self):
        generator = generator_of(endless, **ENDLESS)
        generator.submit("x", FOR_EVER)
        pieces = generator.stream("x", FOR_EVER)  # never begun
        del pieces
        gc.collect()
        wait_until(lambda: generator._batcher._thread is None)
        assert generator.decoder.sequences == {}

    def test_ten_thousand_requests_some_of_them_cancelled_leave_nothing(self):
        """From several threads, at any point of their life."""
        generator = generator_of(endless, max_batch_size=8, max_waiting=20, num_blocks=60)

        def work(seed: int) -> int:
            rng = random.Random(seed)
            num_cancelled = 0
            for _ in range(100):
                handles = []
                for _ in range(10):
                    params = SamplingParams(
                        max_new_tokens=rng.randint(1, 4),
                        temperature=0.0,
                        n=rng.choice((1, 1, 1, 3)),
                    )
                    handles.append(generator.submit("x" * rng.randint(1, 9), params))
                for handle in handles:
                    if rng.random() < 0.5:
                        handle.cancel()
                        num_cancelled += 1
                    else:
                        assert all(set(c.text) == {"a"} for c in handle.result())
            return num_cancelled

        with ThreadPoolExecutor(10) as pool:
            num_cancelled = sum(pool.map(work, range(10)))
        assert 4000 < num_cancelled < 6000
        assert generator.decoder.sequences == generator.decoder.pages == {}
        assert generator._budget._num_promised == 0
        assert not generator._batcher._scheduler.jobs

    def test_ctrl_c(self):
        """It ends the requests of the call that it interrupts, and no others."""
        generator = generator_of(endless, **ENDLESS)
        other = generator.submit("x", FOR_EVER)
        main = threading.main_thread().ident
        for work in (
            lambda: generator.generate(["x"] * 40, FOR_EVER),
            lambda: list(generator.stream("x", FOR_EVER)),
        ):

            def interrupt() -> None:
                wait_until(lambda: len(generator.decoder.sequences) > 1)
                signal.pthread_kill(main, signal.SIGINT)

            thread = threading.Thread(target=interrupt)
            thread.start()
            with pytest.raises(KeyboardInterrupt):
                work()
            thread.join()
            gc.collect()  # the stream may have been interrupted before it began
            wait_until(lambda: len(generator.decoder.sequences) == 1)
            assert not other.done
        other.cancel()
        assert generator.decoder.sequences == {}


def waiting_pieces(handle):
    with contextlib.suppress(CancelledError):
        yield from handle


class TestTheQueue:
    def test_it_is_bounded(self):
        generator = generator_of(endless, **ENDLESS, max_batch_size=1, max_waiting=2)
        running = generator.submit("x", FOR_EVER)
        next(iter(running))
        waiting = [generator.submit("x", GREEDY) for _ in range(2)]
        for timeout in (0, 0.01):
            with pytest.raises(TimeoutError, match=r"2 prompts wait already \(max_waiting\)"):
                generator.submit("x", GREEDY, timeout=timeout)
        late = []
        thread = threading.Thread(target=lambda: late.append(generator.submit("x", SHORT)))
        thread.start()
        thread.join(0.01)
        assert thread.is_alive()  # it blocks ...
        waiting.pop().cancel()
        thread.join()  # ... until there is room
        running.cancel()
        waiting.pop().cancel()
        assert late[0].result()[0].finish_reason == "length"

    def test_the_prompts_of_one_call_come_in_together(self):
        generator = generator_of(by_hash, max_batch_size=2, max_waiting=1)
        assert len(generator.generate(["ab"] * 50, SHORT)) == 50
        assert generator.decoder.num_rows[:2] == [4, 2]


class TestErrors:
    def test_of_a_step_reach_those_in_it_and_nobody_else(self):
        generator = generator_of(by_hash, max_batch_size=2)
        expected = generator_of(by_hash).generate("ab", SHORT)
        generator.decoder.error = RuntimeError
        with one_step_at_a_time(generator.decoder) as allow_step:
            handles = [generator.submit("ab", SHORT) for _ in range(4)]
            allow_step()
            wait_until(lambda: len(generator.decoder.num_rows) == 1)
            # whoever was in the first step is in the second
            generator.decoder.fails_at_step = 1
        for handle in handles:
            handle._job.wait()
        failed = [handle for handle in handles if handle._job.error is not None]
        assert 0 < len(failed) < 4
        for handle in handles:
            if handle in failed:
                with pytest.raises(RuntimeError, match="as the test wants it"):
                    handle.result()
            else:
                assert handle.result() == expected
        assert generator.decoder.sequences == {}
        assert generator.generate("ab", SHORT) == expected

    def test_of_a_step_in_a_generate(self):
        generator = generator_of(by_hash, max_batch_size=2)
        generator.decoder.fails_at_step, generator.decoder.error = 3, MemoryError
        with pytest.raises(MemoryError):
            generator.generate(["ab"] * 20, SHORT)
        assert generator.decoder.sequences == {}
        assert len(generator.generate(["ab"] * 20, SHORT)) == 20

    def test_of_starting(self, monkeypatch):
        generator = generator_of(by_hash)

        def add_sequence() -> int:
            raise MemoryError("no slot")

        with monkeypatch.context() as patch:
            patch.setattr(generator.decoder, "add_sequence", add_sequence)
            for params in (SHORT, SamplingParams(n=2)):
                with pytest.raises(MemoryError, match="no slot"):
                    generator.generate(["ab"] * 3, params)
            with pytest.raises(MemoryError, match="no slot"):
                generator.score("ab")
        assert generator._budget._num_promised == 0
        assert len(generator.generate(["ab"] * 3, SHORT)) == 3

    def test_of_the_caller_do_not_leave_the_work_behind(self):
        generator = generator_of(endless, **ENDLESS, max_batch_size=2)

        def on_completion(completion) -> None:
            raise LookupError(completion.text)

        params = [SamplingParams(temperature=0.0, max_new_tokens=2), FOR_EVER, FOR_EVER]
        with pytest.raises(LookupError, match="aa"):
            generator.generate(["x"] * 3, params, on_completion=on_completion)
        assert generator.decoder.sequences == {}


class TestClosing:
    def test_it_ends_everything(self):
        with generator_of(endless, **ENDLESS, max_batch_size=1, max_waiting=1) as generator:
            running = generator.submit("x", FOR_EVER)
            next(iter(running))
            waiting = generator.submit("x", FOR_EVER)
            blocked = []

            def submit() -> None:
                try:
                    generator.submit("x", FOR_EVER)
                except RuntimeError as error:
                    blocked.append(str(error))

            thread = threading.Thread(target=submit)
            thread.start()
        thread.join()
        assert generator.decoder.sequences == {}
        for handle in (running, waiting):
            with pytest.raises(RuntimeError, match="the generator was closed"):
                handle.result()
        assert blocked == ["the generator is closed: make a new one"]
        for work in (generator.generate, generator.submit, generator.score):
            with pytest.raises(RuntimeError, match="the generator is closed"):
                work("x")
        generator.close()

    def test_an_idle_generator_has_no_thread(self):
        generator = generator_of(by_hash)
        for _ in range(3):
            generator.generate("ab", SHORT)
            generator.score("ab")
            wait_until(lambda: generator._batcher._thread is None)

    def test_a_program_may_end_while_there_is_work(self):
        program = (
            "import sys, torch; sys.path.insert(0, sys.argv[1]);"
            "from rule_decoder import endless, generator_of;"
            "from leangpt import SamplingParams;"
            "generator = generator_of(endless, max_seq_len=sys.maxsize);"
            "handle = generator.submit('x', SamplingParams(max_new_tokens=None));"
            "print(next(iter(handle)))"
        )
        folder = str(Path(__file__).parent)
        run = subprocess.run(
            [sys.executable, "-P", "-c", program, folder],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert (run.returncode, run.stdout, run.stderr) == (0, "a\n", "")


class TestPages:
    """A request starts only when what it needs at worst is free."""

    def test_what_can_never_fit_is_refused_at_once(self):
        generator = generator_of(by_hash, kv_block_size=4, num_blocks=5)
        generator.generate([1] * 11, SamplingParams(max_new_tokens=10))  # 20 are appended
        with pytest.raises(ValueError, match="prompt 1 may need 6 pages of 4 tokens.* only 5"):
            generator.generate([[1], [1] * 12], SamplingParams(max_new_tokens=10))
        with pytest.raises(ValueError, match="prompt 0 may need 6 pages"):
            generator.submit([1] * 12, SamplingParams(max_new_tokens=10))
        with pytest.raises(ValueError, match="text 1 may need 6 pages"):
            generator.score([[1], [1] * 22])
        with pytest.raises(ValueError, match="context with candidate 1 may need 7 pages"):
            generator.rank([1] * 10, [[1], [1] * 12])
        generator.score([[1] * 21])
        generator.rank([1] * 9, [[1], [1] * 12])

    @pytest.mark.parametrize("num_blocks", [3, 7, 100])
    def test_as_many_run_as_fit(self, num_blocks):
        generator = generator_of(by_hash, kv_block_size=4, num_blocks=num_blocks)
        # 2 tokens, and 6 new ones: 7 are appended, two pages
        completions = generator.generate(["ab"] * 20, SHORT)
        assert len(completions) == 20
        assert generator.decoder.most_sequences == min(20, num_blocks // 2)
        assert generator.decoder.most_pages <= num_blocks

    @settings(deadline=None, max_examples=30)
    @given(data=st.data())
    def test_it_never_runs_out(self, data):
        kv_block_size = data.draw(st.integers(1, 5))
        requests = data.draw(
            st.lists(
                st.tuples(st.integers(1, 12), st.integers(1, 8), st.integers(1, 4)),
                min_size=1,
                max_size=8,
            )
        )
        params = [
            SamplingParams(max_new_tokens=m, n=n, seed=1, ignore_eos=True) for _, m, n in requests
        ]
        prompts = [[97] * length for length, _, _ in requests]
        options = {
            "kv_block_size": kv_block_size,
            "max_batch_size": data.draw(st.integers(1, 5)),
            "max_batch_tokens": data.draw(st.integers(1, 20)),
            "speculate": data.draw(st.sampled_from((0, 3))),
        }
        unlimited = generator_of(by_hash, **options)
        needed = max(
            unlimited._budget.blocks_of_prompt(job.request)
            + unlimited._budget.blocks_of_draft(job.request)
            for job in unlimited._generations(prompts, params, "error")
        )
        expected = unlimited.generate(prompts, params)
        num_blocks = needed + data.draw(st.integers(0, 6))
        generator = generator_of(by_hash, num_blocks=num_blocks, **options)
        score_texts = [prompt[: num_blocks * kv_block_size] for prompt in prompts]
        with ThreadPoolExecutor(1) as pool:
            scores = pool.submit(generator.score, score_texts)
            assert generator.generate(prompts, params) == expected
            assert scores.result() == unlimited.score(score_texts)
        assert generator.decoder.most_pages <= num_blocks
        assert generator._budget._num_promised == 0

    def test_a_score_waits_for_pages_and_is_not_passed_by(self):
        generator = generator_of(endless, max_seq_len=sys.maxsize, kv_block_size=4, num_blocks=10)
        with one_step_at_a_time(generator.decoder) as allow_step:
            params = SamplingParams(temperature=0.0, max_new_tokens=20)
            first = generator.submit([97], params)  # 5 pages
            allow_step()
            # the next step has taken what was submitted, and takes no more until it ends
            wait_until(lambda: generator.decoder.num_rows and generator.decoder.is_waiting)
            with ThreadPoolExecutor(1) as pool:
                score = pool.submit(generator.score, [[97] * 41])  # all 10
                wait_until(lambda: len(generator._batcher._inbox) == 1)
                later = generator.submit([97], params)
                for _ in range(19):
                    allow_step()
                first.result()
                allow_step()  # it is the score's
                assert len(score.result()[0].logprobs) == 41
                assert not later.done
                for _ in range(20):
                    allow_step()
                later.result()
        assert generator.decoder.num_rows == [1] * 20 + [40] + [1] * 20

    def test_a_score_does_not_wait_for_a_prompt_that_waits_for_it(self):
        """Of three completions one runs at a time: the prompt's pages are held in between."""
        generator = generator_of(endless, kv_block_size=4, num_blocks=5, max_batch_size=1)
        params = SamplingParams(temperature=0.0, max_new_tokens=5, n=3)
        with one_step_at_a_time(generator.decoder) as allow_step:
            several = generator.submit([97] * 9, params)
            allow_step()
            # the next step has taken what was submitted, and takes no more until it ends
            wait_until(lambda: generator.decoder.num_rows and generator.decoder.is_waiting)
            with ThreadPoolExecutor(1) as pool:
                score = pool.submit(generator.score, [[97] * 21])  # all pages
                wait_until(lambda: len(generator._batcher._inbox) == 1)
                for _ in range(1 + 15):
                    allow_step()
                assert len(score.result()[0].logprobs) == 21
        assert len(several.result()) == 3


class TestProgress:
    def test_it_is_shown_on_standard_error_when_asked_for(self, capsys):
        generator = generator_of(by_hash)
        generator.generate(["ab"] * 5, SamplingParams(max_new_tokens=2, n=2))
        assert capsys.readouterr().err == ""
        generator.generate(["ab"] * 5, SamplingParams(max_new_tokens=2, n=2), progress=True)
        assert "10/10" in capsys.readouterr().err
