package main

import (
	"fmt"

	"github.com/alecthomas/kong"
)

type completionCmd struct {
	Shell string   `arg:"" enum:"bash,zsh,fish,words" help:"bash, zsh or fish."`
	Words []string `arg:"" optional:"" passthrough:"" hidden:"" help:"Words typed so far, for words."`
}

func (completionCmd) Help() string {
	return `Prints a script that completes verbs and flags in your shell.

Examples:

  source <(decuwatch completion bash)
  source <(decuwatch completion zsh)
  decuwatch completion fish | source`
}

// Scripts ask the program itself what may follow the words before the cursor.
var completions = map[string]string{
	"bash": `_decuwatch() {
  local words
  words=$(decuwatch completion words "${COMP_WORDS[@]:1:COMP_CWORD-1}" 2>/dev/null)
  COMPREPLY=($(compgen -W "$words" -- "${COMP_WORDS[COMP_CWORD]}"))
}
complete -o default -F _decuwatch decuwatch
`,
	"zsh": `_decuwatch() {
  local -a found
  found=(${(f)"$(decuwatch completion words "${(@)words[2,CURRENT-1]}" 2>/dev/null)"})
  compadd -a found
  _files
}
compdef _decuwatch decuwatch
`,
	"fish": `function __decuwatch_words
  set -l typed (commandline -opc)
  decuwatch completion words $typed[2..-1] 2>/dev/null
end
complete -c decuwatch -a '(__decuwatch_words)'
`,
}

func (c *completionCmd) Run(s *streams, k *kong.Kong) error {
	if script, ok := completions[c.Shell]; ok {
		_, err := fmt.Fprint(s.out, script)
		return err
	}
	for _, word := range follow(k.Model.Node, c.Words) {
		fmt.Fprintln(s.out, word)
	}
	return nil
}

// follow returns the verbs and flags that may follow the words.
func follow(node *kong.Node, words []string) (list []string) {
	for _, word := range words {
		for _, child := range node.Children {
			if child.Name == word {
				node = child
			}
		}
	}
	for _, child := range node.Children {
		if !child.Hidden && child.Type == kong.CommandNode {
			list = append(list, child.Name)
		}
	}
	for _, group := range node.AllFlags(true) {
		for _, flag := range group {
			list = append(list, "--"+flag.Name)
		}
	}
	return list
}
