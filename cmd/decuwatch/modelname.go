package main

import (
	"fmt"

	"github.com/decuwatch/decuwatch/internal/modelname"
)

// modelName is the name of a model that a flag gives; "" stands for every model.
type modelName string

// Validate is called by kong once the flags are read.
func (m modelName) Validate() error {
	if m != "" && !modelname.Valid(string(m)) {
		return fmt.Errorf("%q is no model's name, which is %s", string(m), modelname.Rule)
	}
	return nil
}
