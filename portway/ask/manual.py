"""What `ask` says of itself: the manual and the shells' completions, both from one table of options."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

from portway import __version__

if TYPE_CHECKING:
    from portway.ask.command import Options

SHELLS = ("bash", "zsh", "fish")


class Option(NamedTuple):
    """An option. `value` is what its value is called, "" for a switch; `short` and `text` are for one line
    and for the manual.
    """

    names: tuple[str, ...]
    value: str
    short: str
    text: str


OPTIONS = (
    Option(("-m", "--model"), "NAME", "ask this model", "Ask the model NAME, as `ask --tiers` lists them."),
    Option(
        ("-f", "--file"),
        "FILE",
        "add a file to the question",
        "Put FILE before the question, with its name. May be given several times; a quoted pattern "
        "('src/**/*.py') is expanded. A PNG, JPEG, GIF or WebP picture goes to the model as a picture; any other "
        "file that is not UTF-8 text is refused.",
    ),
    Option(("-s", "--system"), "TEXT", "set the system prompt", "Send TEXT as the system prompt."),
    Option(
        ("-t", "--temperature"),
        "N",
        "set the temperature",
        "Sample at temperature N, from 0 to 2, in place of the model's own.",
    ),
    Option(
        ("--json",),
        "",
        "make the answer a JSON object",
        "Have the model answer with a JSON object. Exit status 0 then means that the answer is valid JSON.",
    ),
    Option(
        ("--schema",),
        "FILE",
        "make the answer JSON of this schema",
        "Have the model answer with JSON of the JSON Schema in FILE. Exit status 0 means valid JSON; whether it "
        "keeps to the schema is up to the backend.",
    ),
    Option(
        ("-x", "--extract"),
        "",
        "print only the code block",
        "Print only the content of the answer's first fenced code block. Without a whole one nothing goes to "
        "stdout, the answer goes to stderr, and the exit status is 1.",
    ),
    Option(
        ("-n", "--no-input"),
        "",
        "leave standard input alone",
        "Don't read standard input: for `while read` loops, and where it is a pipe that nobody closes.",
    ),
    Option(
        ("--refresh",),
        "",
        "ask again, and cache the answer",
        "Ask the model even if the answer is in the cache, and put the new one there.",
    ),
    Option(("--no-cache",), "", "leave the cache alone", "Neither take the answer from the cache nor put it there."),
    Option(
        ("--strict",),
        "",
        "accept no other model",
        "Accept no other model in place of the one that was asked; if that one fails, the exit status is 4.",
    ),
    Option(
        ("-v", "--verbose"),
        "",
        "say who answered, and how fast",
        "Say on stderr who answered, whether from the cache, how many tokens (prompt + answer) and seconds it took.",
    ),
    Option(
        ("--show-thinking",), "", "show the reasoning", "Show the model's reasoning on stderr, dimmed on a terminal."
    ),
    Option(
        ("--last",),
        "",
        "print the last answer again",
        "Print the last whole answer again, asking nobody. With -x, its first code block.",
    ),
    Option(("--tiers",), "", "list what can be asked", "List the models that can be asked, with the option of each."),
    Option(
        ("--completion",),
        "SHELL",
        "print a completion script",
        "Print the completion script for bash, zsh or fish: see EXAMPLES.",
    ),
    Option(("-h", "--help"), "", "print the manual", "Print this."),
    Option(("--version",), "", "print the version", "Print the version."),
)

_BEFORE = """\
NAME
    ask - ask a language model on this machine, from the shell

SYNOPSIS
    ask [OPTION]... QUESTION...
    COMMAND | ask [OPTION]... QUESTION...
    ask --last

DESCRIPTION
    Sends QUESTION to Portway, which finds a model for it, and prints the answer
    on stdout: as it comes on a terminal, at once and whole into a pipe or a
    file. Everything else goes to stderr.

    Standard input and files go before the question, each in a fence with its
    name. Without QUESTION, standard input is the question.

    If the model that was asked fails, Portway may ask another one. Then stderr
    always says so: [degraded: fast-9b \u2192 fast-1b]; likewise if one of a council
    did not answer.

    On a terminal, control characters in an answer are shown, not obeyed. Into a
    pipe the answer goes as it is, in UTF-8.

TIERS
    --NAME asks the model that has `flag = "NAME"` in Portway's configuration:
    --9b, --3b, --1b, --think, --coder, --heavy, --council, where these are
    configured; `ask --tiers` lists what is. Without one, the model of
    $PORTWAY_MODEL is asked, else the one that is configured as the default.

OPTIONS
    Options may stand before, after and between the words of the question; what
    follows -- is question, even if it begins with a dash.

"""

_AFTER = """
EXIT STATUS
    0    answered (if by another model than the one asked, stderr says so)
    1    failed; what came of the answer until then is on stdout
    2    the command line can't be understood, names a tier that there isn't, or
         a file that can't be read
    3    Portway is not running (start it: portway serve)
    4    the model failed, and --strict lets no other one answer
    130  interrupted by Ctrl-C; the generation was cancelled
    141  stdout was closed (ask ... | head); the generation was cancelled

ENVIRONMENT
    PORTWAY_URL      where Portway is; default http://127.0.0.1:11436
    PORTWAY_API_KEY  the key to send, if its configuration has api_keys
    PORTWAY_MODEL    the model to ask if no option names one
    NO_COLOR         if not empty, nothing is dimmed

FILES
    ${XDG_STATE_HOME:-~/.local/state}/portway/last-answer
        the last whole answer, for --last; only its owner may read it
    ${XDG_DATA_HOME:-~/.local/share}/portway/log.jsonl
        Portway's log: `portway stats` sums it up. How an ask ended is added if
        Portway can't know: that it was not running, or why the answer would not
        do. No text of questions or answers stands there

EXAMPLES
    ask "what does SIGPIPE do?"
    git diff --staged | ask --9b "a one-line commit message for this"
    ask -f notes.md -f 'src/*.py' "which of the notes are out of date?"
    ask -x --coder "a bash function that prints a random word" > word.sh
    ask --json -t 0 "name, city of: 'Ann lives in Rome'" | jq -r .city
    ask --strict --9b "..." || echo "fast-9b did not answer"

    eval "$(ask --completion bash)"                  # in ~/.bashrc
    ask --completion zsh > ~/.zfunc/_ask             # in a folder of $fpath
    ask --completion fish > ~/.config/fish/completions/ask.fish
"""


def text(options: Options) -> str:
    """What `options` ask to be told: manual, version or completion script. Raises ValueError."""
    if options.help:
        return manual()
    if options.version:
        return f"ask {__version__}\n"
    return completion(options.completion or "")


def manual() -> str:
    """The whole of `ask --help`."""
    return _BEFORE + "\n".join(_manual_entry(option) for option in OPTIONS) + _AFTER


def _manual_entry(option: Option) -> str:
    import textwrap

    head = ", ".join(option.names) + (f" {option.value}" if option.value else "")
    indent = " " * 8
    wrapped = textwrap.fill(
        option.text, 80, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
    )
    return f"    {head}\n{wrapped}\n"


# --- Completions -----------------------------------------------------------------------------


def completion(shell: str) -> str:
    """The script that makes `shell` complete ask's command line. It asks the daemon for the tiers when
    it is used, so that it need not be made anew when they change. Raises ValueError.
    """
    scripts = {"bash": _bash, "zsh": _zsh, "fish": _fish}
    if shell not in scripts:
        raise ValueError(f"--completion {shell}: there are {', '.join(SHELLS)}")
    return scripts[shell]()


_BASH = """\
# bash completion for ask: eval "$(ask --completion bash)"
_ask() {
    local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD - 1]} IFS=$' \t\n'
    [[ $word == = ]] && word=                                   # bash takes --model=NAME for three words
    [[ $before == = ]] && before=${COMP_WORDS[COMP_CWORD - 2]}
    COMPREPLY=()
    case $before in
    @FILE@) compopt -o filenames 2>/dev/null ;;  # bash's own completion, by `complete -o default`
    @NAME@) COMPREPLY=($(compgen -W "$(ask --tiers 2>/dev/null | awk '{ print $NF }')" -- "$word")) ;;
    @SHELL@) COMPREPLY=($(compgen -W "@SHELLS@" -- "$word")) ;;
    @TEXT@) ;;
    *)
        if [[ $word == -* ]]; then
            local tiers=$(ask --tiers 2>/dev/null | awk '/^--/ { print $1 }')
            COMPREPLY=($(compgen -W "@OPTIONS@ $tiers" -- "$word"))
        fi
        ;;
    esac
}
complete -o default -F _ask ask
"""


def _bash() -> str:
    marks = {
        "@FILE@": "|".join(_names_taking("FILE")),
        "@NAME@": "|".join(_names_taking("NAME")),
        "@SHELL@": "|".join(_names_taking("SHELL")),
        "@TEXT@": "|".join(_names_taking("TEXT", "N")),
        "@SHELLS@": " ".join(SHELLS),
        "@OPTIONS@": " ".join(name for option in OPTIONS for name in option.names),
    }
    return _filled(_BASH, marks)


_ZSH = """\
#compdef ask
# zsh completion for ask: save as _ask in a folder of $fpath
_ask_models() {
    compadd -- ${(f)"$(ask --tiers 2>/dev/null | awk '{ print $NF }')"}
}

_ask() {
    local -a tiers
    tiers=(${(f)"$(ask --tiers 2>/dev/null | awk '/^--/ { print $1 "[ask " $2 "]" }')"})
    _arguments -s \\
@OPTIONS@
        $tiers '*:question:_files'
}

# read by `source` it registers itself; found in $fpath it is already the function
if [[ $funcstack[1] == _ask ]]; then _ask "$@"; else compdef _ask ask; fi
"""


def _zsh() -> str:
    actions = {"FILE": "_files", "NAME": "_ask_models", "SHELL": f"({' '.join(SHELLS)})", "TEXT": "", "N": ""}
    lines = []
    for option in OPTIONS:
        value = f":{option.value.lower()}:{actions[option.value]}" if option.value else ""
        often = "*" if "-f" in option.names else ""
        for name in option.names:
            taking = ("=" if name.startswith("--") else "+") if value else ""  # the value may be in the same word
            lines.append(f"        '{often}{name}{taking}[{option.short}]{value}' \\")
    return _filled(_ZSH, {"@OPTIONS@": "\n".join(lines)})


_FISH = r"""
# fish completion for ask: save as ~/.config/fish/completions/ask.fish
@OPTIONS@
complete -c ask -n 'string match -q -- "-*" (commandline -ct)' -a '(ask --tiers 2>/dev/null | string match -- "--*")'
"""


def _fish() -> str:
    takes = {
        "FILE": " -rF",
        "NAME": """ -xa '(ask --tiers 2>/dev/null | string replace -r "^.*\\t" "")'""",
        "SHELL": f" -xa '{' '.join(SHELLS)}'",
        "TEXT": " -x",
        "N": " -x",
        "": "",
    }
    lines = [f"complete -c ask{_fish_names(option)}{takes[option.value]} -d '{option.short}'" for option in OPTIONS]
    return _filled(_FISH.lstrip(), {"@OPTIONS@": "\n".join(lines)})


def _names_taking(*values: str) -> Iterator[str]:
    return (name for option in OPTIONS if option.value in values for name in option.names)


def _filled(template: str, marks: Mapping[str, str]) -> str:
    for mark, filling in marks.items():
        template = template.replace(mark, filling)
    return template


def _fish_names(option: Option) -> str:
    return "".join(f" -l {name[2:]}" if name.startswith("--") else f" -s {name[1:]}" for name in option.names)
