// An ONNX Runtime that breaks on demand: a library that is loaded in place of the real one, passes every call through, and
// reads before each run from a file what is to become of it. See ortfault.go.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "onnxruntime_c_api.h"

static const OrtApi *real;
static OrtApi api;
static OrtApiBase base;
static const OrtApiBase *real_base;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char last[64]; // the order that `left` counts down
static long left;     // runs that it still applies to; negative: all

// read_order reads the file "MODE", or "MODE RUNS". An empty or missing file is "ok".
static void read_order(char *text, size_t size) {
	const char *path = getenv("ORTFAULT_FILE");
	FILE *f = path ? fopen(path, "re") : NULL;
	text[0] = 0;
	if (f) {
		if (!fgets(text, (int)size, f)) text[0] = 0;
		fclose(f);
	}
	text[strcspn(text, "\n")] = 0;
}

// take_order returns the mode of this run and counts it.
static void take_order(char *mode, size_t size) {
	char text[64];
	read_order(text, sizeof text);
	pthread_mutex_lock(&lock);
	if (strcmp(text, last) != 0) {
		memcpy(last, text, sizeof last);
		char *runs = strchr(text, ' ');
		left = runs ? strtol(runs + 1, NULL, 10) : -1;
	}
	if (left == 0) {
		text[0] = 0;
	} else if (left > 0) {
		left--;
	}
	pthread_mutex_unlock(&lock);
	text[strcspn(text, " ")] = 0;
	snprintf(mode, size, "%s", text[0] ? text : "ok");
}

// fill_nan overwrites a float32 output.
static OrtStatus *fill_nan(OrtValue *value) {
	OrtTensorTypeAndShapeInfo *info = NULL;
	OrtStatus *status = real->GetTensorTypeAndShape(value, &info);
	if (status) return status;
	size_t n = 0;
	enum ONNXTensorElementDataType type;
	float *data = NULL;
	status = real->GetTensorShapeElementCount(info, &n);
	if (!status) status = real->GetTensorElementType(info, &type);
	if (!status && type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) {
		status = real->GetTensorMutableData(value, (void **)&data);
		for (size_t i = 0; !status && i < n; i++) data[i] = NAN;
	}
	real->ReleaseTensorTypeAndShapeInfo(info);
	return status;
}

static OrtStatus *ORT_API_CALL run(OrtSession *session, const OrtRunOptions *options, const char *const *input_names, const OrtValue *const *inputs,
                                   size_t input_len, const char *const *output_names, size_t output_len, OrtValue **outputs) {
	char mode[64], text[64];
	take_order(mode, sizeof mode);
	if (strcmp(mode, "error") == 0) return real->CreateStatus(ORT_FAIL, "ortfault: the device failed");
	if (strcmp(mode, "hang") == 0) { // whoever terminates the run is not heard
		do {
			usleep(10000);
			read_order(text, sizeof text);
		} while (strncmp(text, "hang", 4) == 0);
	}
	OrtStatus *status = real->Run(session, options, input_names, inputs, input_len, output_names, output_len, outputs);
	if (!status && strcmp(mode, "nan") == 0) {
		for (size_t i = 0; !status && i < output_len; i++) status = fill_nan(outputs[i]);
	}
	return status;
}

static const OrtApi *ORT_API_CALL get_api(uint32_t version) {
	real = real_base->GetApi(version);
	if (!real) return NULL;
	memcpy(&api, real, sizeof api);
	api.Run = run;
	return &api;
}

ORT_EXPORT const OrtApiBase *ORT_API_CALL OrtGetApiBase(void) {
	const char *path = getenv("ORTFAULT_LIBRARY");
	void *library = dlopen(path ? path : "", RTLD_NOW | RTLD_LOCAL);
	const OrtApiBase *(*get)(void) = library ? (const OrtApiBase *(*)(void))dlsym(library, "OrtGetApiBase") : NULL;
	if (!get) {
		fprintf(stderr, "ortfault: ORTFAULT_LIBRARY %s: %s\n", path ? path : "", dlerror());
		return NULL;
	}
	real_base = get();
	base = *real_base;
	base.GetApi = get_api;
	return &base;
}
