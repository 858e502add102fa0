package review

import (
	"bytes"
	"fmt"
	"image"
	"image/color"
	"image/png"
	"math"

	"golang.org/x/image/draw"

	"github.com/decuwatch/decuwatch/scoring/ensemble"
)

// encodeImage returns the PNG of an image [channels*height*width] with values in [-1, 1], its longer side at most side
// pixels.
func encodeImage(pixels []float32, shape ensemble.Image, side int) ([]byte, error) {
	plane := shape.Width * shape.Height
	if len(pixels) != shape.Size() || shape.Channels != 1 && shape.Channels != 3 {
		return nil, fmt.Errorf("%d values are no image of %d x %d x %d", len(pixels), shape.Channels, shape.Height,
			shape.Width)
	}
	level := func(v float32) uint8 { return uint8(math.Round(255 * min(max((float64(v)+1)/2, 0), 1))) }
	if shape.Channels == 1 {
		gray := image.NewGray(image.Rect(0, 0, shape.Width, shape.Height))
		for i := range plane {
			gray.Pix[i] = level(pixels[i])
		}
		return encode(gray, image.NewGray, side)
	}
	full := image.NewRGBA(image.Rect(0, 0, shape.Width, shape.Height))
	for i := range plane {
		full.SetRGBA(i%shape.Width, i/shape.Width, color.RGBA{
			level(pixels[i]), level(pixels[plane+i]), level(pixels[2*plane+i]), 255,
		})
	}
	return encode(full, image.NewRGBA, side)
}

// encodeMap returns the PNG of a map [height*width] of uncertainty, 0 to bound nats: colors from dark violet over red
// to yellow, transparent at zero uncertainty, so that it lies over an image. One scale for all maps: they
// compare.
func encodeMap(values []float64, width, height int, bound float64, side int) ([]byte, error) {
	if len(values) != width*height || !(bound > 0) {
		return nil, fmt.Errorf("%d values are no map of %d x %d up to %v nats", len(values), height, width, bound)
	}
	heat := image.NewNRGBA(image.Rect(0, 0, width, height))
	for i, v := range values {
		heat.SetNRGBA(i%width, i/width, heatColor(v/bound))
	}
	return encode(heat, image.NewNRGBA, side)
}

// heatStops are the colors of the map from zero to the maximum; lightness rises along them, so that they also read
// without colour.
var heatStops = []color.NRGBA{{60, 15, 110, 0}, {110, 25, 110, 150}, {190, 55, 80, 200}, {240, 110, 30, 225},
	{252, 190, 60, 240}, {252, 255, 164, 250}}

// heatColor returns the colour of a value in [0, 1]; its square root is taken, so that small differences show.
func heatColor(v float64) color.NRGBA {
	at := math.Sqrt(min(max(v, 0), 1)) * float64(len(heatStops)-1)
	i := min(int(at), len(heatStops)-2)
	f := at - float64(i)
	mix := func(a, b uint8) uint8 { return uint8(math.Round(float64(a) + f*(float64(b)-float64(a)))) }
	a, b := heatStops[i], heatStops[i+1]
	return color.NRGBA{mix(a.R, b.R), mix(a.G, b.G), mix(a.B, b.B), mix(a.A, b.A)}
}

// encode returns the PNG of src, scaled down if its longer side is above side. 512 x 512 pixels of three channels,
// and of the map's one value, stay below 1 MiB however they look; anything larger is an error.
func encode[T draw.Image](src T, blank func(image.Rectangle) T, side int) ([]byte, error) {
	if w, h := src.Bounds().Dx(), src.Bounds().Dy(); max(w, h) > side {
		scale := float64(side) / float64(max(w, h))
		small := blank(image.Rect(0, 0, max(1, int(float64(w)*scale)), max(1, int(float64(h)*scale))))
		draw.CatmullRom.Scale(small, small.Bounds(), src, src.Bounds(), draw.Src, nil)
		src = small
	}
	var out bytes.Buffer
	if err := png.Encode(&out, src); err != nil {
		return nil, err
	}
	if out.Len() > 1<<20 {
		return nil, fmt.Errorf("the PNG has %d bytes, the most is %d", out.Len(), 1<<20)
	}
	return out.Bytes(), nil
}
