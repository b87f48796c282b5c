/* What a program without a system needs: memory that is taken and forgotten, and a serial port to write to. */

#pragma once

#include <stddef.h>
#include <stdint.h>

#define SERIAL 0x3F8
#define MEMORY ((char *)0x4000000) /* from 64 MiB on; the program lies below */

static char *next = MEMORY;

void *memcpy(void *to, const void *from, size_t size) {
    for (size_t i = 0; i < size; i++) ((char *)to)[i] = ((const char *)from)[i];
    return to;
}

void *memset(void *to, int value, size_t size) {
    for (size_t i = 0; i < size; i++) ((char *)to)[i] = (char)value;
    return to;
}

int memcmp(const void *one, const void *other, size_t size) {
    for (size_t i = 0; i < size; i++)
        if (((const char *)one)[i] != ((const char *)other)[i]) return 1;
    return 0;
}

/* Memory that holds anything but zeros. */
static void *take(size_t size) {
    char *taken = (char *)(((uintptr_t)next + 63) / 64 * 64);
    next = taken + size;
    return memset(taken, 0xAB, size);
}

static void forget(void) { next = MEMORY; }

void *malloc(size_t size) { return take(size); }
void *aligned_alloc(size_t alignment, size_t size) { return (void)alignment, take(size); }
void free(void *taken) { (void)taken; }

static void write_port(uint16_t port, uint8_t value) { __asm__ volatile("outb %0, %1" ::"a"(value), "Nd"(port)); }

static uint8_t read_port(uint16_t port) {
    uint8_t value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static void put(char letter) {
    while (!(read_port(SERIAL + 5) & 0x20)) {}
    write_port(SERIAL, (uint8_t)letter);
}

static void put_text(const char *text) {
    write_port(SERIAL + 3, 3); /* eight bits, no parity */
    while (*text) put(*text++);
}

static void say_line(const char *text) { put_text(text), put('\n'); }

static void say(const char *text, int64_t number) {
    char digits[20];
    int count = 0;
    put_text(text);
    do digits[count++] = (char)('0' + number % 10), number /= 10;
    while (number);
    while (count) put(digits[--count]);
}
