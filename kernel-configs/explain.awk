# Says of every missing symbol why Kconfig may have dropped it.
# Files, in this order: the configuration, the missing symbols, the kernel's Kconfig files.
# It reads `config` entries with their `depends on` and the `if` and `menu` blocks around them in the same file;
# what a file is sourced under is not followed, so a condition can stay unnamed.
FNR == 1 { depth = 0; inside = ""; help = 0 }

FILENAME == ARGV[1] {
	if ($0 ~ /^CONFIG_/) {
		eq = index($0, "=")
		value[substr($0, 8, eq - 8)] = substr($0, eq + 1)
	}
	next
}
FILENAME == ARGV[2] {
	split($0, part, "\t")
	order[++count] = part[1]
	want[part[1]] = part[2]; fragment[part[1]] = part[3]; has[part[1]] = part[4]
	next
}

# Help texts are indented deeper than the keyword and may say anything.
help && /^[ \t]*$/ { next }
help {
	match($0, /^[ \t]*/)
	text = substr($0, 1, RLENGTH)
	gsub(/\t/, "        ", text)
	if (length(text) > help_indent) next
	help = 0
}
/^[ \t]*(---)?help(---)?[ \t]*$/ {
	match($0, /^[ \t]*/)
	text = substr($0, 1, RLENGTH)
	gsub(/\t/, "        ", text)
	help = 1; help_indent = length(text) - 1
	next
}
/\\$/ { sub(/\\$/, ""); held = held $0; next }
held != "" { $0 = held $0; held = "" }

$1 == "config" || $1 == "menuconfig" {
	inside = $2
	if (inside in want) {
		seen[inside] = 1
		for (level = 1; level <= depth; level++)
			if (condition[level] != "") add(inside, condition[level])
	}
	next
}
$1 == "if" { inside = ""; line = $0; sub(/^[ \t]*if[ \t]+/, "", line); condition[++depth] = line; next }
$1 == "menu" || $1 == "choice" { inside = ""; condition[++depth] = ""; block = depth; next }
$1 == "endif" || $1 == "endmenu" || $1 == "endchoice" { inside = ""; if (depth > 0) depth--; next }
$1 == "comment" || $1 == "source" { inside = ""; next }
$1 == "depends" && $2 == "on" {
	line = $0
	sub(/^[ \t]*depends[ \t]+on[ \t]+/, "", line)
	if (inside == "") { if (depth > 0 && condition[depth] == "") condition[depth] = line }
	else if (inside in want) add(inside, line)
	next
}
inside in want && ($1 ~ /^(bool|tristate|string|int|hex)$/) && NF > 1 { prompt[inside] = 1; prompt_condition(inside); next }
inside in want && $1 == "prompt" { prompt[inside] = 1; prompt_condition(inside); next }
$1 == "select" && ($2 in want) && inside != "" { selectors[$2] = selectors[$2] " " inside; next }

function add(symbol, text) { depends[symbol] = depends[symbol] (depends[symbol] == "" ? "" : "\n") text }

# `bool "Text" if COND`: without COND nobody can choose the symbol.
function prompt_condition(symbol,    line) {
	line = $0
	if (match(line, /"[ \t]+if[ \t]+/)) add(symbol, substr(line, RSTART + RLENGTH))
}

# The states of the symbols that an expression names: those that are off are what to look at.
function states(text,    names, total, name, i, out) {
	total = split(text, names, /[^A-Za-z0-9_]+/)
	for (i = 1; i <= total; i++) {
		name = names[i]
		if (name !~ /^[A-Z0-9_]*[A-Z][A-Z0-9_]*$/) continue
		out = out (out == "" ? "" : ", ") name "=" ((name in value) ? value[name] : "n")
	}
	return out
}

END {
	for (i = 1; i <= count; i++) {
		symbol = order[i]
		printf "configure: CONFIG_%s: fragment %s wants %s, the configuration has %s\n", symbol, fragment[symbol], want[symbol], has[symbol]
		if (!(symbol in seen)) {
			printf "    this kernel has no such symbol\n"
			continue
		}
		total = split(depends[symbol], lines, "\n")
		for (j = 1; j <= total; j++)
			printf "    depends on %s  (%s)\n", lines[j], states(lines[j])
		if (!(symbol in prompt))
			printf "    it cannot be chosen by itself; selected by:%s\n", selectors[symbol] == "" ? " nothing" : selectors[symbol]
		else if (want[symbol] == "n" && selectors[symbol] != "")
			printf "    selected by:%s\n", selectors[symbol]
	}
}
