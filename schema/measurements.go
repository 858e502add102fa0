package schema

import "fmt"

// SetMeasurement sets the score's measurement of a name. It panics if no measurement has the name.
func (s *Score) SetMeasurement(name MeasurementName, m Measurement) {
	switch name {
	case ClassGap:
		s.ClassGap = m
	case RequestRisk:
		s.RequestRisk = &m
	case ImageRisk:
		s.ImageRisk = &m
	default:
		panic(fmt.Sprintf("schema: no measurement is named %q", name))
	}
}
