package settings

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"slices"

	"go.yaml.in/yaml/v3"
)

// Entries reads a YAML list of mappings, each of which is decoded into a T. The error names the entry, counted from 1.
// An unknown key is an error, and so is one of the required keys that is missing or empty. An empty text is an empty
// list.
func Entries[T any](text []byte, required ...string) ([]T, error) {
	var nodes []yaml.Node
	decoder := yaml.NewDecoder(bytes.NewReader(text))
	if err := decoder.Decode(&nodes); err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("must be a list of mappings: [{...}, {...}]: %w", err)
	}
	list := make([]T, len(nodes))
	for i, node := range nodes {
		if err := entry(node, &list[i], required); err != nil {
			return nil, fmt.Errorf("entry %d: %w", i+1, err)
		}
	}
	return list, nil
}

func entry(node yaml.Node, to any, required []string) error {
	if node.Kind != yaml.MappingNode {
		return errors.New("must be a mapping")
	}
	var keys []string
	for i := 0; i < len(node.Content); i += 2 {
		if node.Content[i+1].Tag == "!!null" {
			return fmt.Errorf("%s is empty", node.Content[i].Value)
		}
		keys = append(keys, node.Content[i].Value)
	}
	for _, key := range required {
		if !slices.Contains(keys, key) {
			return fmt.Errorf("%s is missing", key)
		}
	}
	text, err := yaml.Marshal(&node)
	if err != nil {
		return err
	}
	decoder := yaml.NewDecoder(bytes.NewReader(text)) // a node's own Decode takes unknown keys
	decoder.KnownFields(true)
	return decoder.Decode(to)
}
