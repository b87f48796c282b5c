/* instead of the library's: there is none */
#define INFINITY __builtin_inff()
