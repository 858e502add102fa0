package evaluation

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"

	"github.com/decuwatch/decuwatch/scoring/ensemble"
)

// rotations returns the manifests at path: path itself if it is a file, else the directory's ensemble.json and then all
// manifests that share its backbone.
func rotations(path string) ([]string, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !info.IsDir() {
		return []string{path}, nil
	}
	first := filepath.Join(path, ensemble.ManifestName)
	backbone, err := backboneOf(first)
	if err != nil {
		return nil, err
	}
	if backbone == "" {
		return nil, fmt.Errorf("%s is not a manifest of an ensemble", first)
	}
	files, err := filepath.Glob(filepath.Join(path, "*.json"))
	if err != nil {
		return nil, err
	}
	manifests := []string{first}
	for _, file := range files { // sorted
		if file == first {
			continue
		}
		other, err := backboneOf(file)
		if err != nil {
			return nil, err
		}
		if other == backbone {
			manifests = append(manifests, file)
		}
	}
	return manifests, nil
}

// backboneOf returns the SHA-256 of a manifest's U-Net, or "" if the file is not a manifest.
func backboneOf(file string) (string, error) {
	content, err := os.ReadFile(file)
	if err != nil {
		return "", err
	}
	var m struct {
		Format string         `json:"format"`
		Files  ensemble.Files `json:"files"`
	}
	if err := json.Unmarshal(content, &m); err != nil || m.Format != ensemble.Format1 && m.Format != ensemble.Format2 {
		return "", nil //nolint:nilerr // other JSON files may lie beside manifests
	}
	return m.Files.UNet.SHA256, nil
}
