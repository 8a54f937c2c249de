"""The house rules that a machine can check. Each failure says what to do; CONTRIBUTING.md says why."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "chitu_diffusion"
FOLDERS = ("chitu_diffusion", "training", "benchmarks", "examples", "tests")
LONGEST_FILE = 500
LONGEST_BODY = 60
LONGEST_CELL = 200
MOST_TOP_MODULES = 10
BANNED_NAMES = {"utils", "util", "common", "helpers", "helper", "misc", "stuff"}
BUDGETS = {
    "": 2370,
    "attention": 2060,
    "cli": 4660,
    "distributed": 2145,
    "evaluation": 2215,
    "executor": 1940,
    "files": 645,
    "flexcache": 2770,
    "media": 1650,
    "memory": 690,
    "models": 7580,
    "ops": 2180,
    "pipelines": 4345,
    "sampling": 1330,
    "task": 1215,
    "adapters": 720,
    "weights": 1880,
    "service": 8030,
}
"""Lines of Python that each room of the package may have; "" is the top. Whoever raises one says why in the
commit."""

PRIVATE_WORDS = {
    "accuse": "HeartbeatMonitor.mark_failed",
    "alone": "LocalExecutor, single",
    "crew": "WorkerGroup, workers",
    "facade": "api",
    "follower": "worker",
    "hear": "receive",
    "lay": "open, write",
    "land": "arrive, recv_buffer",
    "landing": "recv_buffer",
    "lockstep": "DistributedExecutor",
    "moment": "StepInfo",
    "mourn": "HeartbeatMonitor.check_process",
    "orders": "ControlChannel, messages",
    "peers": "Collectives, ranks",
    "residency": "OffloadManager, offload",
    "seam": "interface",
    "tell": "report, publish",
    "vouch": "check",
    "wires": "PeerMemory",
}
"""Words that this project once made up, and the field's for what they meant."""
FIELDS_WORDS = {"moments"}
"""Forms of these that the field has, too: second moments of a distribution."""

# getattr with a default, where the object is not ours and may really lack the name: "file: name".
# a VAE may be diffusers' own network, whose blocks have other classes than ours
FOREIGN_ATTRIBUTES: frozenset[str] = frozenset(
    (
        "chitu_diffusion/models/wan/vae_decoder.py: upsampler",
        "chitu_diffusion/models/wan/vae_decoder.py: avg_shortcut",
        "chitu_diffusion/models/wan/vae_encoder.py: downsampler",
        "chitu_diffusion/models/wan/vae_encoder.py: resample",
    )
)

Source = tuple[str, ast.Module, str]


@cache
def sources() -> tuple[Source, ...]:
    """Every Python file as (path from the root, syntax tree, text)."""
    files = sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))
    texts = ((str(file.relative_to(ROOT)), file.read_text(encoding="utf-8")) for file in files)
    return tuple((name, ast.parse(text), text) for name, text in texts)


def ours() -> Iterator[Source]:
    """The package alone."""
    return (source for source in sources() if source[0].startswith("chitu_diffusion/"))


def report(problems: list[str], remedy: str) -> None:
    assert not problems, f"{remedy}:\n  " + "\n  ".join(problems)


def test_files_are_short() -> None:
    long = [
        f"{name}: {text.count(chr(10))} lines"
        for name, _, text in sources()
        if text.count("\n") > LONGEST_FILE
    ]
    report(long, f"no file over {LONGEST_FILE} lines; split it where it knows two things")


def test_functions_are_short() -> None:
    long = []
    for name, tree, _ in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                first = node.body[1 if ast.get_docstring(node) and len(node.body) > 1 else 0]
                lines = node.end_lineno - first.lineno + 1
                if lines > LONGEST_BODY:
                    long.append(f"{name}:{node.lineno} {node.name} has {lines} lines")
    report(long, f"no function body over {LONGEST_BODY} lines; give its parts names")


def test_names_say_what_is_inside() -> None:
    bad = [name for name, _, _ in sources() if BANNED_NAMES & set(Path(name).with_suffix("").parts)]
    report(bad, "name the file after what it knows; utils, common, helpers and misc say nothing")


def test_names_are_the_fields_words() -> None:
    """Identifiers of the package; prose may use a word for what it commonly means."""
    found = set()
    for name, tree, _ in ours():
        for node in ast.walk(tree):
            found |= {f"{name} {identifier(node)}: say {said}" for said in private_in(identifier(node))}
        found |= {f"{name}: say {said}" for said in private_in(name.removesuffix(".py"))}
    report(sorted(found), "use the field's word")


def private_in(identifier: str) -> set[str]:
    """The field's words for those of an identifier that are private, in whichever form."""
    words = words_of(identifier) - FIELDS_WORDS
    return {said for word, said in PRIVATE_WORDS.items() if words & forms_of(word)}


def forms_of(word: str) -> set[str]:
    """`crew` -> crew, crews, crewed, crewing; `accuse` -> accuse, accuses, accused, accusing."""
    stem = word.removesuffix("e")
    return {word, word + "s", stem + "ed", stem + "ing"}


@pytest.mark.parametrize(
    "line",
    [
        "class Crews: ...",
        "def laying(): ...",
        "accused = 1",
        "import os as crew",
        "from os import path as wires",
        "self.old_landing = 1",
        "def f(*, crew_size): ...",
        "class RemoteCrew: ...",
    ],
)
def test_private_words_are_found_in_every_form(line: str) -> None:
    names = [identifier(node) for node in ast.walk(ast.parse(line))]
    assert any(private_in(name) for name in names), names
    assert not private_in("layer_orderly_peer_wire")


def identifier(node: ast.AST) -> str:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return node.name
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return node.id
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        return node.attr
    if isinstance(node, ast.alias):
        return node.asname or ""
    return node.arg if isinstance(node, ast.arg) else ""


def words_of(identifier: str) -> set[str]:
    """Its parts: `lost_after`, `CudaWires` -> {"lost", "after"}, {"cuda", "wires"}."""
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", identifier)}


def test_messages_say_what_to_use() -> None:
    found = [
        f"{name}:{number}"
        for name, _, text in ours()
        for number, line in enumerate(text.splitlines(), start=1)
        if "would do" in line
    ]
    report(found, "say 'use 1 or 2', not '1 or 2 would do'")


def test_a_class_has_a_name_of_its_own() -> None:
    places: dict[str, list[str]] = {}
    for name, tree, _ in sources():
        if name.startswith(("chitu_diffusion/", "benchmarks/")):
            for node in tree.body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    places.setdefault(node.name, []).append(name)
    twice = [f"{name}: {', '.join(files)}" for name, files in places.items() if len(files) > 1]
    report(twice, "two public classes of one name; say in the name what sets them apart")


def test_modules_say_what_they_know() -> None:
    bare = [name for name, tree, text in sources() if text.strip() and not ast.get_docstring(tree)]
    report(bare, "begin the file with a docstring: what it knows, and what it does not")


def test_one_assignment_a_line() -> None:
    """A tuple on both sides is for a swap, where a value reads what another one sets."""
    found = []
    for name, tree, _ in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
                values = node.value.elts if isinstance(node.value, ast.Tuple) else []
                read = {part.id for value in values for part in ast.walk(value) if isinstance(part, ast.Name)}
                written = {part.id for part in ast.walk(node.targets[0]) if isinstance(part, ast.Name)}
                if values and not read & written:
                    found.append(f"{name}:{node.lineno}")
    report(found, "one assignment a line")


def test_rooms_keep_their_budgets() -> None:
    lines = dict.fromkeys(BUDGETS, 0)
    for name, _, text in ours():
        room = name.split("/")[1] if name.count("/") > 1 else ""
        lines[room] = lines.get(room, 0) + text.count("\n")
    over = [
        f"{room or 'the top'}: {lines[room]} lines, {BUDGETS.get(room, 0)} allowed"
        for room in lines
        if lines[room] > BUDGETS.get(room, 0)
    ]
    report(over, "a room has grown: find what can go, or raise its budget and say why in the commit")


def test_the_top_has_few_modules() -> None:
    top = sorted(file.name for file in PACKAGE.glob("*.py"))
    assert len(top) <= MOST_TOP_MODULES, f"put it into a room; the top holds {', '.join(top)}"


PAGES_SCHEDULER = "chitu_diffusion/sampling/scheduler.py"
"""Takes one step a call, for loops that others write; so it may call the sampler, and may not loop."""


def test_there_is_one_loop_and_one_resolve() -> None:
    for function in ("sampler.step", "resolve_request"):
        places = [
            f"{name}:{line}"
            for name, tree, _ in ours()
            for line in uses_of(function, tree)
            if name != PAGES_SCHEDULER
        ]
        assert len(places) == 1, f"{function} stands in {places}: call the function that does it already"
    loops = (ast.For, ast.While, ast.comprehension)
    tree = next(tree for name, tree, _ in ours() if name == PAGES_SCHEDULER)
    assert not [node for node in ast.walk(tree) if isinstance(node, loops)], f"{PAGES_SCHEDULER} loops"


def uses_of(function: str, tree: ast.AST) -> list[int]:
    """The lines that name a function, called or not: under another name it would be called elsewhere."""
    names = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute | ast.Name))
    return [node.lineno for node in names if re.search(rf"\b_?{re.escape(function)}$", ast.unparse(node))]


def test_a_loop_under_another_name_is_found() -> None:
    for line in ("advance = backend.sampler.step", "self._sampler.step(1)", "map(sampler.step, states)"):
        assert uses_of("sampler.step", ast.parse(line)) == [1], line
    assert not uses_of("sampler.step", ast.parse("sampler.steps(); solver.step()"))


def test_the_page_s_generator_is_thin() -> None:
    lines = (PACKAGE / "generator.py").read_text(encoding="utf-8").count("\n")
    assert lines < 200, f"generator.py has {lines} lines; it holds the page's methods, stages hold the work"


def test_no_global_statement() -> None:
    found = [
        f"{name}:{node.lineno}"
        for name, tree, _ in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.Global)
    ]
    report(found, "hold the state in an object and hand it over, in place of 'global'")


def test_no_mutable_class_attribute() -> None:
    found = []
    for name, tree, _ in sources():
        for owner in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
            for item in owner.body:
                if (
                    isinstance(item, ast.Assign | ast.AnnAssign)
                    and item.value is not None
                    and is_mutable(item.value)
                ):
                    found.append(f"{name}:{item.lineno} in class {owner.name}")
    report(found, "make it an instance attribute, a tuple, or field(default_factory=...)")


def is_mutable(value: ast.expr) -> bool:
    if isinstance(value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp):
        return True
    made_by = value.func.id if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) else ""
    return made_by in {"list", "dict", "set", "defaultdict", "deque", "OrderedDict", "Counter"}


def test_no_broad_except_that_forgets() -> None:
    found = []
    for name, tree, _ in ours():
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler) and is_broad(node.type) and not keeps_the_error(node):
                found.append(f"{name}:{node.lineno}")
    report(found, "name the exceptions, raise again, or record the error that was caught")


def is_broad(kind: ast.expr | None) -> bool:
    if kind is None:
        return True
    names = kind.elts if isinstance(kind, ast.Tuple) else [kind]
    return any(isinstance(name, ast.Name) and name.id in {"Exception", "BaseException"} for name in names)


def keeps_the_error(handler: ast.ExceptHandler) -> bool:
    inside = [node for statement in handler.body for node in ast.walk(statement)]
    raises = any(isinstance(node, ast.Raise) for node in inside)
    names_it = any(isinstance(node, ast.Name) and node.id == handler.name for node in inside)
    return raises or (handler.name is not None and names_it)


def test_environment_is_read_in_one_place() -> None:
    found = []
    for name, tree, _ in ours():
        for node in ast.walk(tree):
            reads = isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv", "environb"}
            if reads and name != "chitu_diffusion/config.py":
                found.append(f"{name}:{node.lineno}")
    report(found, "add a setting to config.py, and take it from there")


def test_files_are_written_in_one_place() -> None:
    found = []
    for name, tree, _ in ours():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            writes = node.func.attr in {"write_text", "write_bytes"}
            writes |= node.func.attr == "open" and any("'w" in ast.unparse(value) for value in node.args)
            renames = ast.unparse(node.func) in {"os.replace", "os.rename"}
            of = ast.unparse(node.func.value)
            inside = of in ("part", "av", "Path(os.devnull)") or of.startswith("part / ")
            if (renames or (writes and not inside)) and not name.endswith("/files/atomic.py"):
                found.append(f"{name}:{node.lineno} {ast.unparse(node.func)}")
    report(found, "use files.atomic.write_text, or fill the 'part' that new_file and new_folder give")


def test_we_know_what_our_objects_have() -> None:
    found = []
    for name, tree, _ in ours():
        for node in ast.walk(tree):
            is_getattr = (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in {"getattr", "hasattr"}
            )
            if not is_getattr or (node.func.id == "getattr" and len(node.args) < 3):
                continue
            asked = node.args[1].value if isinstance(node.args[1], ast.Constant) else "?"
            if f"{name}: {asked}" not in FOREIGN_ATTRIBUTES:
                found.append(f"{name}:{node.lineno} asks for {asked}")
    remedy = (
        "give the class the attribute; for a foreign object add 'file: name' to FOREIGN_ATTRIBUTES with a "
        "reason"
    )
    report(found, remedy)


FORBIDDEN_CALLS = {
    "eval": "parse it",
    "exec": "call a function",
    "yaml.load": "yaml.safe_load, or TOML",
    "os.system": "subprocess with a list",
    "pickle.load": "safetensors or JSON",
    "pickle.loads": "safetensors or JSON",
    "pickle.dump": "safetensors or JSON",
    "pickle.dumps": "safetensors or JSON",
}


def test_nothing_runs_what_it_reads() -> None:
    found = []
    for name, tree, _ in (source for source in sources() if not source[0].startswith("tests/")):
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
                if called in FORBIDDEN_CALLS:
                    found.append(f"{name}:{node.lineno} {called}: {FORBIDDEN_CALLS[called]}")
                if called == "torch.load" and keywords.get("weights_only") != "True":
                    found.append(f"{name}:{node.lineno} torch.load without weights_only=True")
                if keywords.get("allow_pickle") == "True" or keywords.get("trust_remote_code") == "True":
                    found.append(f"{name}:{node.lineno} {called} runs code from a file")
    report(found, "data must stay data")


def test_the_log_has_short_cells() -> None:
    lines = (ROOT / "docs" / "log.md").read_text(encoding="utf-8").splitlines()
    found = [
        f"line {number}: {len(cell.strip())} characters"
        for number, line in enumerate(lines, start=1)
        if line.startswith("|")
        for cell in line.strip("| ").split("|")
        if len(cell.strip()) > LONGEST_CELL
    ]
    report(found, f"no cell over {LONGEST_CELL} characters in docs/log.md")


def test_documents_name_what_there_is() -> None:
    """Paths of files in the texts; the log speaks of what was, and is left out."""
    texts = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    found = []
    for text in (text for text in texts if text.name != "log.md"):
        for name in re.findall(
            r"[\w./-]+/[\w.-]+\.(?:py|md|json|png|jpg|toml)\b", text.read_text(encoding="utf-8")
        ):
            places = (text.parent, ROOT, PACKAGE)
            if not name.startswith(("outputs/", "http")) and not any(
                (place / name).exists() for place in places
            ):
                found.append(f"{text.relative_to(ROOT)}: {name}")
    report(found, "no such file")


def test_no_machine_is_named() -> None:
    pattern = re.compile(r"(?<![\w.])/(?:home|root|Users|mnt|work)/\w+")
    folders = [*(ROOT / folder for folder in FOLDERS), ROOT / "docs"]
    files = [
        file for folder in folders for ending in ("*.py", "*.md", "*.toml") for file in folder.rglob(ending)
    ]
    files += [
        file
        for name in ("README.md", "CONTRIBUTING.md", "Makefile", "pyproject.toml")
        if (file := ROOT / name).exists()
    ]
    found = []
    for file in files:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            if file.name != Path(__file__).name and pattern.search(line):
                found.append(f"{file.relative_to(ROOT)}:{number} {line.strip()[:80]}")
    report(found, "write paths relative to the project, or as FOLDER")


@pytest.mark.parametrize(
    "module",
    [
        "chitu_diffusion",
        "chitu_diffusion.cli.app",
        "chitu_diffusion.media.video",
        "chitu_diffusion.sampling.registry",
        "chitu_diffusion.task",
    ],
)
def test_importing_is_cheap(module: str) -> None:
    heavy = ("torch", "numpy", "diffusers", "transformers", "pydantic", "av", "PIL", "huggingface_hub")
    heavy += ("sqlalchemy", "alembic")
    code = f"import sys, {module}; print(*sorted(set(sys.modules) & set({heavy!r})))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    report(loaded, f"importing {module} must not load these; import them inside the function that needs them")


def test_no_modules_import_each_other() -> None:
    """Lazy imports and those for types count, too."""
    graph = grimp.build_graph("chitu_diffusion", cache_dir=None)
    # but the package itself, which hands out names from all over when they are asked for
    modules = graph.modules - {"chitu_diffusion"}
    after = {module: graph.find_modules_directly_imported_by(module) for module in modules}
    while free := [module for module, imported in after.items() if not imported & after.keys()]:
        for module in free:
            del after[module]
    # what is left are the circles, and whoever imports one of them
    report(sorted(after), "modules import each other in a circle: move what both need into one below")
