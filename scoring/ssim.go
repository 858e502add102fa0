package scoring

import (
	"math"

	"github.com/decuwatch/decuwatch/scoring/ensemble"
)

// similarities returns the structural similarity of each pair of images, and 1 minus its mean over different images.
func similarities(images [][]float32, shape ensemble.Image) ([][]float64, float64) {
	matrix := make([][]float64, len(images))
	for i := range matrix {
		matrix[i] = make([]float64, len(images))
		matrix[i][i] = 1
	}
	sum, pairs := 0.0, 0
	for i := range images {
		for j := range i {
			v := ssim(images[i], images[j], shape)
			matrix[i][j], matrix[j][i] = v, v
			sum += v
			pairs++
		}
	}
	if pairs == 0 {
		return matrix, 0
	}
	return matrix, 1 - sum/float64(pairs)
}

// ssim returns the mean structural similarity of two images [channels, height, width] with values in [-1, 1]: windows
// of 11 pixels (the largest odd number that fits, for smaller images) weighted by a Gaussian of standard deviation
// 1.5, those that lie inside the image; K1 = 0.01, K2 = 0.03; the mean over windows and channels.
//
// Reference: Wang, Bovik, Sheikh and Simoncelli, "Image Quality Assessment: From Error Visibility to Structural
// Similarity" (IEEE Transactions on Image Processing, 2004).
func ssim(a, b []float32, shape ensemble.Image) float64 {
	const valueRange = 2
	const c1, c2 = (0.01 * valueRange) * (0.01 * valueRange), (0.03 * valueRange) * (0.03 * valueRange)
	window := min(11, shape.Height, shape.Width)
	window -= 1 - window%2
	weights := make([]float64, window)
	total := 0.0
	for i := range weights {
		d := float64(i - window/2)
		weights[i] = math.Exp(-d * d / (2 * 1.5 * 1.5))
		total += weights[i]
	}
	for i := range weights {
		weights[i] /= total
	}
	height, width := shape.Height-window+1, shape.Width-window+1
	// The five weighted means of a window, rows first, then columns.
	rows := make([][5]float64, shape.Height*width)
	sum := 0.0
	for c := range shape.Channels {
		x, y := a[c*shape.Height*shape.Width:], b[c*shape.Height*shape.Width:]
		for r := range shape.Height {
			for col := range width {
				var m [5]float64
				for k, w := range weights {
					p, q := float64(x[r*shape.Width+col+k]), float64(y[r*shape.Width+col+k])
					m[0] += w * p
					m[1] += w * q
					m[2] += w * p * p
					m[3] += w * q * q
					m[4] += w * p * q
				}
				rows[r*width+col] = m
			}
		}
		for r := range height {
			for col := range width {
				var m [5]float64
				for k, w := range weights {
					for i, v := range rows[(r+k)*width+col] {
						m[i] += w * v
					}
				}
				varianceA, varianceB, covariance := m[2]-m[0]*m[0], m[3]-m[1]*m[1], m[4]-m[0]*m[1]
				sum += (2*m[0]*m[1] + c1) * (2*covariance + c2) / ((m[0]*m[0] + m[1]*m[1] + c1) * (varianceA + varianceB + c2))
			}
		}
	}
	return sum / float64(shape.Channels*height*width)
}
