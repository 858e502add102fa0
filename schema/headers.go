package schema

import (
	"mime"
	"net/url"
	"strings"
	"unicode/utf8"
)

// cloudEventsHeaders returns the content type, in lower case, and the attributes that stand in ce- headers, as the
// CloudEvents NATS binding has them (section 3.1.3). Header names have no case.
func cloudEventsHeaders(header map[string][]string) (contentType string, attributes map[string]any, err error) {
	attributes = map[string]any{}
	seen := map[string]bool{}
	for _, name := range sortedNames(header) {
		lower := strings.ToLower(name)
		attribute, ce := strings.CutPrefix(lower, "ce-")
		if !ce && lower != "content-type" {
			continue
		}
		values := header[name]
		if len(values) != 1 {
			return "", nil, invalid(clip(lower), "header is given %d times, must be given once", len(values))
		}
		if seen[lower] {
			return "", nil, invalid(clip(lower), "header is given twice")
		}
		seen[lower] = true
		if !ce {
			if contentType, err = mediaType(values[0]); err != nil {
				return "", nil, err
			}
			continue
		}
		if attribute == "data" {
			return "", nil, invalid("data", "is the payload, not a header")
		}
		if attributes[attribute], err = headerValue(attribute, values[0]); err != nil {
			return "", nil, err
		}
	}
	return contentType, attributes, nil
}

// traceHeaders returns the W3C trace context in the headers of a message, as instrumented NATS clients send it, or "".
func traceHeaders(header map[string][]string) (parent, state string) {
	for _, name := range sortedNames(header) {
		values := header[name]
		if strings.EqualFold(name, HeaderTraceParent) && len(values) == 1 && isTraceParent(values[0]) {
			parent = values[0]
		}
		if strings.EqualFold(name, "tracestate") && len(values) == 1 && len(values[0]) <= 512 {
			state = values[0]
		}
	}
	if parent == "" {
		return "", ""
	}
	return parent, state
}

// mediaType returns the media type of a Content-Type header without its parameters, in lower case.
func mediaType(value string) (string, error) {
	media, parameters, err := mime.ParseMediaType(value)
	if err != nil {
		return "", invalid("content-type", "%s is not a media type", quote(value))
	}
	for name, v := range parameters {
		if name == "charset" && !strings.EqualFold(v, "utf-8") {
			return "", invalid("content-type", "charset %s must be utf-8", quote(v))
		}
	}
	return media, nil
}

// headerValue undoes the encoding of an attribute in a header: a quoted string first, then one round of
// percent-encoding.
func headerValue(attribute, value string) (string, error) {
	value = strings.Trim(value, " \t")
	if strings.ContainsFunc(value, func(r rune) bool { return r < ' ' || r > '~' }) {
		return "", invalid(
			pathName(attribute),
			"header holds characters that are not printable ASCII, they must be percent-encoded",
		)
	}
	if inside, quoted := strings.CutPrefix(value, `"`); quoted {
		var ok bool
		if value, ok = unquote(inside); !ok {
			return "", invalid(pathName(attribute), "header is not a quoted string as in RFC 7230")
		}
	}
	decoded, err := url.PathUnescape(value)
	if err != nil || !utf8.ValidString(decoded) {
		return "", invalid(pathName(attribute), "header is not the percent-encoding of UTF-8")
	}
	return decoded, nil
}

// unquote returns the text of a quoted string of RFC 7230 whose opening quote is gone.
func unquote(s string) (string, bool) {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		switch c := s[i]; {
		case c == '"':
			return b.String(), i == len(s)-1
		case c == '\\':
			if i++; i == len(s) {
				return "", false
			}
			b.WriteByte(s[i])
		default:
			b.WriteByte(c)
		}
	}
	return "", false
}

// mediaCloudEvents begins the media types of CloudEvents in structured and in batched mode.
const mediaCloudEvents = "application/cloudevents"

// isStructured returns the mode of a message, by its media type and by whether it has ce- headers. A message with
// neither is in structured mode, as before NATS had headers.
func isStructured(media string, headers bool) (bool, error) {
	switch {
	case media == mediaCloudEvents, media == contentTypeStructured, media == "" && !headers:
		return true, nil
	case strings.HasPrefix(media, mediaCloudEvents+"-batch"):
		return false, invalid(
			"content-type",
			"%s: batches are not accepted, publish one message for each event",
			quote(media),
		)
	case strings.HasPrefix(media, mediaCloudEvents):
		return false, invalid("content-type", "%s must be %s", quote(media), contentTypeStructured)
	case !headers:
		return false, invalid(
			"content-type",
			"%s is not %s, and there are no ce- headers",
			quote(media),
			contentTypeStructured,
		)
	case media != "" && media != "application/json":
		return false, invalid("content-type", "%s must be application/json in binary mode", quote(media))
	}
	return false, nil
}
