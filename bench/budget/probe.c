/* Counts what the main thread of a CPython process calls and allocates, in shared memory that another process reads.
 *
 * The process itself does nothing for it: no signal, no socket, no timer, no system call. What CPython calls back is
 * declared here and not taken from its headers, which a machine may lack: these functions are stable in 3.11 to 3.14.
 */
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { EVENTS = 1 << 20, NAMES = 1 << 14, NAME = 192, SLOTS = 1 << 15 };
enum { CALL = 0, C_CALL = 4 }; /* PyTrace_CALL, PyTrace_C_CALL */
enum { OFF, CALLS, ALLOCATIONS }; /* `phase`, which the reader sets */

/* As bench/budget/probe.py reads it. */
static struct shared {
    volatile uint64_t phase, calls, allocations, names;
    char name[NAMES][NAME];
    volatile uint16_t event[EVENTS]; /* the function of each call, the last EVENTS of them */
} *shared;

typedef struct object object;
typedef struct {
    void *context;
    void *(*malloc)(void *, size_t);
    void *(*calloc)(void *, size_t, size_t);
    void *(*realloc)(void *, void *, size_t);
    void (*free)(void *, void *);
} allocator; /* PyMemAllocatorEx */

void PyEval_SetProfile(int (*)(object *, object *, int, object *), object *);
object *PyFrame_GetCode(object *frame);
object *PyObject_GetAttrString(object *, const char *);
const char *PyUnicode_AsUTF8(object *);
int Py_AddPendingCall(int (*)(void *), void *);
void PyMem_GetAllocator(int, allocator *);
void PyMem_SetAllocator(int, allocator *);
object *PyObject_Type(object *);
void PyErr_Clear(void);
void PyErr_Fetch(object **, object **, object **);
void PyErr_Restore(object *, object *, object *);
void Py_DecRef(object *);

static __thread int counted; /* this is the thread that called `begin` */
static allocator original[3];
static struct { void *key; uint16_t id; } slot[SLOTS];

static void append(char *name, object *of, const char *attribute) {
    object *value = PyObject_GetAttrString(of, attribute);
    const char *text = value ? PyUnicode_AsUTF8(value) : NULL;
    if (text) {
        size_t length = strlen(text), most = NAME - 2 - strlen(name);
        if (length > most) text += length - most; /* the end of a path says more than its beginning */
        strcat(strcat(name, text), ":");
    }
    PyErr_Clear();
    if (value) Py_DecRef(value);
}

/* A method is named after the class that has it, and not after that of the first object on which it was called. */
static void append_builtin(char *name, object *function, const char *called) {
    object *self = PyObject_GetAttrString(function, "__self__");
    object *class = self ? PyObject_Type(self) : NULL;
    object *found = class ? PyObject_GetAttrString(class, called) : NULL;
    PyErr_Clear();
    append(name, function, "__module__");
    append(name, found ? found : function, "__qualname__");
    if (found) Py_DecRef(found);
    if (class) Py_DecRef(class);
    if (self) Py_DecRef(self);
}

/* Return the number of a function; `called` is NULL for one of Python, of which `of` is the code. */
static uint16_t identify(void *key, object *of, const char *called) {
    size_t at = ((uintptr_t)key >> 4) * 0x9E3779B97F4A7C15u >> 49;
    while (slot[at].key && slot[at].key != key) at = (at + 1) % SLOTS;
    if (!slot[at].key && shared->names < NAMES) {
        object *error[3]; /* an exception that is thrown into a generator stands while it is called */
        PyErr_Fetch(&error[0], &error[1], &error[2]);
        slot[at].key = key;
        slot[at].id = shared->names;
        char *name = shared->name[slot[at].id];
        if (called)
            append_builtin(name, of, called);
        else
            append(name, of, "co_filename"), append(name, of, "co_qualname");
        shared->names++;
        PyErr_Restore(error[0], error[1], error[2]);
    }
    return slot[at].id;
}

static int on_event(object *self, object *frame, int what, object *argument) {
    (void)self;
    if (shared->phase == ALLOCATIONS) PyEval_SetProfile(NULL, NULL); /* it makes a frame object for each call */
    if (shared->phase != CALLS) return 0;
    uint16_t id;
    if (what == CALL) {
        object *code = PyFrame_GetCode(frame);
        uint64_t known = shared->names;
        id = identify(code, code, NULL);
        if (shared->names == known) Py_DecRef(code); /* one that got an id is kept, so that no other has its address */
    } else if (what == C_CALL) {
        const char **method = ((void **)argument)[2]; /* PyCFunctionObject.m_ml, one for each function: its name is first */
        id = identify(method, argument, *method);
    } else
        return 0;
    shared->event[shared->calls % EVENTS] = id;
    shared->calls++;
    return 0;
}

static int install(void *unused) {
    (void)unused;
    PyEval_SetProfile(on_event, NULL);
    return 0;
}

static void count(void) {
    static int asked;
    if (!counted) return;
    if (shared->phase == ALLOCATIONS) shared->allocations++;
    /* At the next call, and not at the start of the process: its imports would take twice as long. */
    if (shared->phase == CALLS && !asked) asked = 1, Py_AddPendingCall(install, NULL);
}

static void *counting_malloc(void *of, size_t size) {
    allocator *plain = of;
    count();
    return plain->malloc(plain->context, size);
}

static void *counting_calloc(void *of, size_t number, size_t size) {
    allocator *plain = of;
    count();
    return plain->calloc(plain->context, number, size);
}

static void *counting_realloc(void *of, void *old, size_t size) {
    allocator *plain = of;
    count();
    return plain->realloc(plain->context, old, size);
}

static void counting_free(void *of, void *old) {
    allocator *plain = of;
    plain->free(plain->context, old);
}

/* Let the kernel know no io_uring, as containers have it: libuv asks it, where it can, for what is epoll_ctl elsewhere. */
static int forbid_io_uring(void) {
    struct sock_filter lines[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_io_uring_setup, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | 38 /* ENOSYS */),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {sizeof lines / sizeof *lines, lines};
    return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program);
}

/* Counts in this thread from now on, in a new file at `path`; 0, or -1. */
int begin(const char *path) {
    int file = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (file < 0 || ftruncate(file, sizeof *shared) || forbid_io_uring()) return -1;
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (shared == MAP_FAILED) return -1;
    counted = 1;
    for (int domain = 1; domain < 3; domain++) { /* PYMEM_DOMAIN_MEM, PYMEM_DOMAIN_OBJ; both are used under the GIL */
        PyMem_GetAllocator(domain, &original[domain]);
        allocator counting = {&original[domain], counting_malloc, counting_calloc, counting_realloc, counting_free};
        PyMem_SetAllocator(domain, &counting);
    }
    return 0;
}
