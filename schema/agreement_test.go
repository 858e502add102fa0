package schema

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/santhosh-tekuri/jsonschema/v6"
)

// member is a member of a JSON object as it is written.
type member struct{ name, value string }

// document is a CloudEvent as it is written: members may be there twice.
type document struct {
	attributes, data, sampler, labels []member
}

// generator writes documents around the edges of the format.
type generator struct{ *rand.Rand }

func pick[T any](g generator, list []T) T { return list[g.IntN(len(list))] }

// anyValues are values of every JSON type.
var anyValues = []string{`null`, `true`, `false`, `0`, `1`, `-1`, `1.5`, `""`, `"x"`, `"1"`, `{}`, `{"a":1}`, `[]`,
	`[1]`}

// spellings are ways to write an integer.
func spellings(digits string) []string {
	list := []string{digits, digits + ".0", digits + ".000", digits + "e0", digits + "E+0", digits + "e-0",
		digits + "0e-1", digits + "00E-2", digits + ".5", digits + ".00000000000000000001"}
	if strings.HasSuffix(digits, "0") && len(digits) > 1 {
		list = append(list, digits[:len(digits)-1]+"e1", digits[:len(digits)-1]+".0e+1")
	}
	if len(digits) > 1 {
		list = append(list, digits[:1]+"."+digits[1:]+"e"+strconv.Itoa(len(digits)-1))
	}
	return list
}

func numbers(edges ...string) []string {
	list := []string{`-0`, `-0.0`, `0e0`, `0E-400`, `-1e-400`, `1e-400`, `1E400`, `-1E400`, `1e5000`,
		`9007199254740993`, `0.1`, `1e2`, `12345678901234567890123456789`, strings.Repeat("9", 400),
		`0.` + strings.Repeat("0", 400) + `1`}
	for _, e := range edges {
		list = append(list, spellings(e)...)
		list = append(list, "-"+e)
	}
	return list
}

// bounded are strings whose lengths are around a bound, of characters of one to four bytes.
func bounded(most int) []string {
	var list []string
	for _, c := range []string{"a", "é", "€", "😀"} {
		for _, n := range []int{1, most/4 - 1, most / 4, most/4 + 1, most - 1, most, most + 1} {
			list = append(list, `"`+strings.Repeat(c, n)+`"`)
		}
	}
	return append(list, texts...)
}

var texts = []string{
	`""`, `" "`, `" a"`, `"a "`, `"a b"`, `"a\u0020b"`, `"\u0061"`, `"\u00e9"`, `"\ud83d\ude00"`, `"😀"`, `"\ud83d"`,
	`"\ude00"`, `"\ud83d\ud83d"`, `"\ud83dx"`,
	`"\\ud83d"`, `"\\\ud83d"`, `"\ufffd"`, `"\ufffe"`, `"\ufdd0"`, `"\ud83f\udfff"`, `"` + "\U0010ffff" + `"`,
	`"` + "\ufdef" + `"`, `"\u0000"`, `"\n"`, `"\u007f"`, `"\u0085"`, `"\u009f"`,
	`"\u00a0"`, `"\u2028"`, `"\u200b"`, `"\/"`, `"a\"b"`, `"100%"`, `"%zz"`, `"%41"`, "\"\xff\"", "\"\xed\xa0\x80\"",
	"\"\xc0\xa0\"", `"Trouser"`, `"DDIM"`, `"Euler a"`, `"DPM++ 2M SDE Karras"`,
}

var uris = []string{
	`"//studio/render-7"`, `"s"`, `"/a/b"`, `"urn:uuid:6e8bc430-9c3a-11d9-9669-0800200c9a66"`,
	`"https://u:p@h:8/p?q#f"`, `"mailto:a@b"`, `"a:"`, `"a:b"`, `"1a:b"`, `":a"`, `"a/b:c"`, `"?q"`, `"#f"`,
	`"#f#f"`, `"a?b?c"`, `"//h:"`, `"//h:x"`, `"//[::1]"`, `"//[::1]:80/p"`, `"//[::1"`, `"//[1.2.3.4]"`, `"//[::g]"`,
	`"//[v1.a]"`, `"//[fe80::1%25eth0]"`, `"//[:]"`, `"//[::1]x"`, `"//::1"`, `"a[b"`, `"a\\b"`, `"a|b"`,
	`"a^b"`, `"a` + "`" + `b"`, `"<a>"`, `"{a}"`, `"a\"b"`, `"a%20b"`, `"a%2"`, `"a%"`, `"%zz"`, `"//a%41/"`,
	`"münchen"`, `"//münchen"`, `"///"`, `"//"`, `"/"`, `"."`, `"..//"`, `"*"`, `"a b"`, `"a\tb"`, `"//@h"`,
	`"//u@u@h"`, `"a//b"`, `"//h//b"`,
}

// time writes a time, most often with one part around an edge.
func (g generator) time() string {
	parts := [][]string{
		{"2026-03-01", "2020-01-01", "2099-12-31", "2024-02-29", "2025-02-29", "2026-04-31", "2026-04-30", "2026-13-01",
			"2026-00-01", "2026-01-00", "2026-1-01", "2026-01-1", "0000-01-01", "9999-12-31", "1999-12-31",
			"2019-12-31", "2100-01-01", "20260301", "+2026-03-01", "-2026-03-01", "02026-03-01", "2026/03/01",
			"2026-060", "2026-W09-7", "２026-03-01"},
		{"T", "t", " ", "_", "", "TT"},
		{"12:00:00", "00:00:00", "23:59:59", "23:59:60", "24:00:00", "12:00:60", "23:59:61", "12:60:00", "1:00:00",
			"01:0:00", "01:00:0", "12:00", "120000", "+9:00:00", "12:00:-1", " 1:00:00", "12.00.00", "22:59:60",
			"00:29:60"},
		{"", ".0", ".1", ".12", ".123", ".1234", ".12345", ".123456", ".1234567", ".12345678", ".123456789",
			".1234567891", ".12345678912", ".123456789123", "." + strings.Repeat("1", 43), "." + strings.Repeat("1",
				44), ",5", ".", ".5e1", ".-5"},
		{"Z", "z", "+00:00", "-00:00", "+23:59", "-23:59", "+24:00", "-24:00", "+23:60", "+01:00", "-01:00", "-00:30",
			"+0100", "+01", "+1:00", "+01:0", "", " Z", "Z ", "+01:00:00", "UTC", "ZZ", "−01:00"},
	}
	text := ""
	odd := g.IntN(len(parts) + 1)
	for i, list := range parts {
		if i == odd || odd == len(parts) && g.IntN(2) == 0 {
			text += pick(g, list)
		} else {
			text += list[0]
		}
	}
	return `"` + text + `"`
}

// value returns a value for a member: mostly around its bounds, sometimes of any type.
func (g generator) value(path string) string {
	if g.IntN(6) == 0 {
		return pick(g, anyValues)
	}
	switch path {
	case "specversion":
		return pick(g, []string{`"1.0"`, `"1.0"`, `"\u0031.0"`, `"1"`, `"0.3"`, `1.0`, `"1.0 "`, `"1.1"`})
	case "type":
		return pick(g, []string{`"` + TypeGenerationRequested + `"`, `"io.decuwatch.generation.requested\u002ev1"`,
			`"io.decuwatch.generation.requested.v2"`, `"IO.decuwatch.generation.requested.v1"`})
	case "source":
		return pick(g, slices.Concat(uris, []string{`"` + strings.Repeat("s", MaxSource) + `"`,
			`"` + strings.Repeat("s", MaxSource+1) + `"`}, texts))
	case "id":
		return pick(g, bounded(MaxID))
	case "time":
		return g.time()
	case "datacontenttype":
		return pick(g, []string{`"application/json"`, `"Application/JSON"`, `"application/json; charset=utf-8"`,
			`"application/json;charset=\"UTF-8\""`, `"application/json; charset=latin1"`, `"application/jsonx"`,
			`"application/json-patch+json"`,
			`"application/cloudevents+json"`, `"text/json"`, `"application/json;"`,
			`"application/json; charset=utf-8; charset=utf-8"`, `" application/json"`, `"application/json "`,
			`"json"`, `"application/json; profile=a"`, `null`})
	case "subject", "dataschema", "traceparent", "tracestate", "partitionkey", "extension":
		return pick(g, slices.Concat(bounded(MaxAttribute), numbers("2147483647", "2147483648", "2147483649", "30"),
			anyValues))
	case "data.model":
		return pick(g, []string{`"fashion-mnist"`, `"m"`, `"` + strings.Repeat("m", 64) + `"`, `"` + strings.Repeat("m",
			65) + `"`, `"M"`, `"1m"`, `"m.m"`, `"m\n"`, `"mé"`, `"\u006d"`, `""`, `"-m"`, `"m_-9"`})
	case "data.class":
		return pick(g, append(numbers("0", "1", "99998", "99999", "100000", "10"), bounded(MaxClassLabel)...))
	case "data.seed":
		return pick(g, numbers("0", "1", "9007199254740991", "9007199254740992", "9223372036854775807",
			"9223372036854775808", "18446744073709551614", "18446744073709551615", "18446744073709551616",
			"10000000000000000000"))
	case "data.noise":
		return pick(g, append([]string{`"torch-cpu"`, `"torch-cuda"`, `"` + strings.Repeat("n", 64) + `"`,
			`"` + strings.Repeat("n", 65) + `"`, `"-n"`, `"n n"`, `"n\n"`}, texts...))
	case "data.noise_dtype":
		return pick(g, []string{`"float16"`, `"bfloat16"`, `"float32"`, `"float64"`, `"Float32"`, `"torch.float32"`,
			`"float32 "`, `"fp16"`, `"float\u0033\u0032"`})
	case "data.batch_index":
		return pick(g, numbers("0", "1", "65534", "65535", "65536", "10"))
	case "data.batch_size":
		return pick(g, numbers("0", "1", "65536", "65537", "10"))
	case "data.noise_offset":
		return pick(g, numbers("0", "2", "4", "40", "41", "18446744073709551612", "18446744073709551615",
			"18446744073709551616"))
	case "data.gpu":
		return `{"sms":` + pick(g, numbers("0", "1", "132", "4096", "4097")) + `,"threads_per_sm":` +
			pick(g, numbers("255", "256", "2048", "8192", "8193")) + pick(g, []string{"}", "}", "}", `,"name":"H100"}`})
	case "data.latent":
		return g.latent()
	case "data.sampler.name":
		return pick(g, bounded(MaxSamplerName))
	case "data.sampler.steps":
		return pick(g, numbers("0", "1", "2", "50", "999", "1000", "1001"))
	case "data.sampler.guidance_scale":
		return pick(g, numbers("0", "7", "29", "30", "31", "10"))
	case "data.sampler.eta":
		return pick(g, numbers("0", "1", "2"))
	case "data.labels.tenant":
		return pick(g, bounded(MaxLabelValue))
	}
	return pick(g, anyValues)
}

// latent writes a latent, most often with one member around an edge.
func (g generator) latent() string {
	members := []member{{"bucket", `"LATENTS_m"`}, {"name", `"a/b.bin"`}, {"sha256", `"` + strings.Repeat("a", 64) + `"`},
		{"format", `"raw"`}, {"dtype", `"bfloat16"`}, {"shape", `[4,8,8]`}, {"step", `3`}, {"timestep", `901.5`}}
	edges := map[string][]string{
		"bucket": {`"a b"`, `""`, `"` + strings.Repeat("b", 128) + `"`, `"` + strings.Repeat("b", 129) + `"`, `"b.c"`},
		"name":   append(bounded(MaxLatentName), `"!~"`),
		"sha256": {`"` + strings.Repeat("A", 64) + `"`, `"` + strings.Repeat("0", 63) + `"`},
		"format": {`"safetensors"`, `"pickle"`, `"Raw"`}, "dtype": {`"float32"`, `"float16"`, `"float64"`},
		"shape": {`[1,1,1]`, `[1024,1024.0,1e3]`, `[4,8]`, `[4,8,8,1]`, `[0,8,8]`, `[4,8,1025]`, `[4,8,"8"]`, `[4,8,1.5]`,
			`[4,8,null]`},
		"step": numbers("0", "1", "999", "1000"), "timestep": numbers("0", "999", "100000", "100001"),
	}
	at := g.IntN(len(members))
	switch g.IntN(4) {
	case 0:
		members = slices.Delete(members, at, at+1)
	case 1:
		members[at].value = pick(g, append(edges[members[at].name], anyValues...))
	case 2:
		members = append(members[:6:6], member{pick(g, strangers), `1`})
	}
	return g.object(members)
}

// names that no member has, for the envelope, for data and for labels.
var strangers = []string{"extension", "Extension", "", "a_b", "exté", strings.Repeat("x", 20), strings.Repeat("x", 21),
	"data_base64", "SEED", "seed ", "prompt", "a b", "x.y", "-x", "0", strings.Repeat("l", 64), strings.Repeat("l", 65),
	"\U0001fffe"}

func (g generator) document() document {
	d := document{
		attributes: []member{{"specversion", `"1.0"`}, {"type", `"` + TypeGenerationRequested + `"`}, {"source",
			`"//studio/render"`}, {"id", `"01J9-17"`}, {"time", `"2026-03-01T12:00:00.123456Z"`}},
		data:    []member{{"model", `"fashion-mnist"`}, {"class", `3`}, {"seed", `18446744073709551615`}},
		sampler: []member{{"name", `"ddim"`}, {"steps", `50`}, {"guidance_scale", `7.5`}, {"eta", `0`}},
		labels:  []member{{"tenant", `"acme"`}},
	}
	for _, name := range []string{"datacontenttype", "subject", "dataschema", "traceparent", "tracestate",
		"partitionkey"} {
		switch g.IntN(20) {
		case 0:
			d.attributes = append(d.attributes, member{name, g.value(name)})
		case 1, 2, 3, 4:
			d.attributes = append(d.attributes, member{name, `"application/json"`})
		}
	}
	noise := pick(g, []string{`"torch-cpu"`, `"torch-cuda"`})
	for _, optional := range []member{{"noise", noise}, {"noise_dtype", `"float32"`}, {"batch_index", `0`},
		{"batch_size", `8`}, {"noise_offset", `8`}, {"gpu", `{"sms":132,"threads_per_sm":2048}`},
		{"latent", `{"bucket":"LATENTS_m","name":"a","sha256":"` + strings.Repeat("0", 64) +
			`","format":"raw","dtype":"float16","shape":[4,8,8]}`}} {
		switch g.IntN(12) {
		case 0:
			d.data = append(d.data, member{optional.name, g.value("data." + optional.name)})
		case 1, 2, 3:
			d.data = append(d.data, optional)
		}
	}
	groups := []struct {
		prefix  string
		members *[]member
	}{{"", &d.attributes}, {"data.", &d.data}, {"data.sampler.", &d.sampler}, {"data.labels.", &d.labels}}
	for range g.IntN(3) {
		group := pick(g, groups)
		list := *group.members
		at := g.IntN(max(1, len(list)))
		switch change := g.IntN(12); {
		case len(list) == 0 || change == 0: // a stranger, or several
			for range pick(g, []int{1, 1, 1, MaxLabels - 1, MaxLabels, MaxAttributes - 6, MaxAttributes - 5}) {
				name := pick(g, strangers)
				if len(list) > 5 {
					name = fmt.Sprint("more", len(list))
				}
				list = append(list, member{name, g.value(group.prefix + "extension")})
			}
		case change == 1:
			list = slices.Delete(list, at, at+1)
		case change == 2: // the same member twice
			list = append(list, member{list[at].name, g.value(group.prefix + list[at].name)})
		default:
			list[at].value = g.value(group.prefix + list[at].name)
		}
		*group.members = list
	}
	for _, group := range groups {
		g.Shuffle(len(*group.members), func(i, j int) {
			list := *group.members
			list[i], list[j] = list[j], list[i]
		})
	}
	if g.IntN(3) > 0 {
		d.data = append(d.data, member{"sampler", g.object(d.sampler)})
	} else if g.IntN(16) == 0 {
		d.data = append(d.data, member{"sampler", pick(g, anyValues)})
	}
	if g.IntN(3) > 0 {
		d.data = append(d.data, member{"labels", g.object(d.labels)})
	} else if g.IntN(16) == 0 {
		d.data = append(d.data, member{"labels", pick(g, anyValues)})
	}
	return d
}

// object writes members, some of their names with escapes.
func (g generator) object(members []member) string {
	var b strings.Builder
	b.WriteString("{")
	for i, m := range members {
		if i > 0 {
			b.WriteString(",")
		}
		b.WriteString(pick(g, []string{"", "", " ", "\n\t"}))
		if g.IntN(10) == 0 && m.name != "" && m.name[0] < 0x80 {
			fmt.Fprintf(&b, `"\u%04x%s"`, m.name[0], m.name[1:])
		} else {
			fmt.Fprintf(&b, `"%s"`, m.name)
		}
		b.WriteString(":" + m.value)
	}
	return b.String() + "}"
}

// percentEncode writes an attribute as a header, with liberties that the binding gives.
func (g generator) percentEncode(s string) string {
	var b strings.Builder
	for _, c := range []byte(s) {
		switch {
		case c <= ' ' || c == '"' || c == '%' || c > '~' || g.IntN(10) == 0:
			fmt.Fprintf(&b, pick(g, []string{"%%%02X", "%%%02x"}), c)
		default:
			b.WriteByte(c)
		}
	}
	if g.IntN(10) == 0 {
		return `"` + strings.ReplaceAll(b.String(), `\`, `\\`) + `"`
	}
	return b.String()
}

// binary returns the message in binary mode of an accepted document whose attributes are strings or null.
func (g generator) binary(attributes map[string]any, data string) (map[string][]string, bool) {
	header := map[string][]string{}
	for name, v := range attributes {
		s, text := v.(string)
		if v != nil && !text {
			return nil, false
		}
		if v != nil {
			header[pick(g, []string{"ce-", "Ce-", "CE-"})+pick(g, []string{name,
				strings.ToUpper(name)})] = []string{g.percentEncode(s)}
		}
	}
	if g.IntN(2) == 0 {
		header[pick(g, []string{"Content-Type", "content-type"})] = []string{pick(g, []string{"application/json",
			"Application/JSON; charset=utf-8"})}
	}
	return header, true
}

// isIJSON reports whether payload is I-JSON, but for noncharacters, which the JSON Schema refuses. It reads with
// another library than the decoder.
func isIJSON(payload []byte) bool {
	dec := json.NewDecoder(bytes.NewReader(payload))
	dec.UseNumber()
	return utf8.Valid(payload) && json.Valid(payload) && !loneSurrogate(payload) && namesOnce(dec)
}

// namesOnce reports whether no object of the next value has a name twice.
func namesOnce(dec *json.Decoder) bool {
	open, err := dec.Token()
	if open != json.Delim('{') && open != json.Delim('[') {
		return err == nil
	}
	names := map[any]bool{}
	for dec.More() {
		if open == json.Delim('{') {
			name, err := dec.Token()
			if err != nil || names[name] {
				return false
			}
			names[name] = true
		}
		if !namesOnce(dec) {
			return false
		}
	}
	_, err = dec.Token()
	return err == nil
}

// escapes are the escapes of JSON strings; a pair of surrogates is one.
var escapes = regexp.MustCompile(`\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\.`)

// loneSurrogate reports whether a document holds the escape of half a surrogate pair.
func loneSurrogate(payload []byte) bool {
	for _, escape := range escapes.FindAllString(string(payload), -1) {
		if code, err := strconv.ParseUint(strings.TrimPrefix(escape, `\u`), 16, 16); err == nil && code>>11 == 0xd800>>11 {
			return true
		}
	}
	return false
}

// TestDecoderAgreesWithTheSchema generates documents around the edges of the format. The decoder must accept what is
// I-JSON and fits the JSON Schema, and refuse everything else; binary mode must give the same event. The seed that a
// failure prints makes the same documents again.
func TestDecoderAgreesWithTheSchema(t *testing.T) {
	number := func(name string, fallback uint64) uint64 {
		n, err := strconv.ParseUint(os.Getenv(name), 10, 64)
		if err != nil {
			return fallback
		}
		return n
	}
	seed := number("DECUWATCH_TEST_SEED", uint64(time.Now().UnixNano()))
	cases := number("DECUWATCH_TEST_CASES", 20_000)
	t.Logf("DECUWATCH_TEST_SEED=%d DECUWATCH_TEST_CASES=%d", seed, cases)
	g := generator{rand.New(rand.NewPCG(seed, 0))}
	s := compile(t, eventSchema)
	now := time.Date(2099, 12, 31, 23, 59, 59, 0, time.UTC) // so that no time is too far ahead
	accepted, binary := 0, 0
	for range cases {
		d := g.document()
		data := g.object(d.data)
		payload := []byte(g.object(append(d.attributes, member{"data", data})))
		if len(payload) > MaxPayload {
			continue
		}
		want := isIJSON(payload)
		var why error
		if want {
			v, err := jsonschema.UnmarshalJSON(bytes.NewReader(payload))
			if err != nil {
				t.Fatalf("%v: %s", err, payload)
			}
			why = s.Validate(v)
			want = why == nil
		}
		e, err := decode(nil, payload, now)
		if (err == nil) != want {
			t.Fatalf("the decoder says %v, the schema %v:\n%s", err, why, payload)
		}
		if err != nil {
			continue
		}
		accepted++
		again, body, err := Encode(e)
		if err == nil {
			back, err := Decode(again, body)
			if err != nil || !reflect.DeepEqual(back, e) {
				t.Fatalf("encoded and decoded: %v\n got %+v\nwant %+v", err, back, e)
			}
		} else if !strings.Contains(err.Error(), "ahead") {
			t.Fatalf("cannot be encoded: %v\n%s", err, payload)
		}
		tree, err := parse(payload)
		if err != nil {
			t.Fatal(err)
		}
		attributes := maps.Clone(tree.(map[string]any))
		delete(attributes, "data")
		header, ok := g.binary(attributes, data)
		if !ok {
			continue
		}
		binary++
		if got, err := decode(header, []byte(data), now); err != nil || !reflect.DeepEqual(got, e) {
			t.Fatalf("binary mode: %v\n got %+v\nwant %+v\n%q", err, got, e, header)
		}
	}
	t.Logf("%d of %d accepted by both, %d of them in binary mode too", accepted, cases, binary)
	if accepted < int(cases/10) || accepted > int(cases*9/10) || binary < accepted/4 {
		t.Errorf("the documents do not lie on both sides: %d of %d accepted, %d in binary mode", accepted, cases,
			binary)
	}
}
