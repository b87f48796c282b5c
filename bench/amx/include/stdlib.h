/* instead of the library's: there is none */
#include <stddef.h>
void *malloc(size_t);
void *aligned_alloc(size_t, size_t);
void free(void *);
