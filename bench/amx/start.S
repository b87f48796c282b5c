/* From where a multiboot loader leaves a processor to C in 64 bits, with all that AVX-512 and AMX need switched on. */

.section .multiboot, "a"
.align 8
.long 0x1BADB002, 0, -0x1BADB002

.text
.code32
.globl _start
_start:
    cli
    movl $stack, %esp
    movl $directories, %eax /* memory as it is, 1 GiB in pages of 2 MiB */
    orl $3, %eax
    movl %eax, tables
    movl $pages, %eax
    orl $3, %eax
    movl %eax, directories
    movl $pages, %edi
    movl $0x83, %eax
    movl $512, %ecx
1:  movl %eax, (%edi)
    movl $0, 4(%edi)
    addl $0x200000, %eax
    addl $8, %edi
    loop 1b
    movl $tables, %eax
    movl %eax, %cr3
    movl %cr4, %eax
    orl $0x40620, %eax /* long pages, SSE and its exceptions, XSAVE */
    movl %eax, %cr4
    movl $0xC0000080, %ecx
    rdmsr
    orl $0x100, %eax /* 64 bits */
    wrmsr
    movl %cr0, %eax
    andl $~0xC, %eax
    orl $0x80000003, %eax
    movl %eax, %cr0
    lgdt descriptor
    ljmp $8, $long

.code64
long:
    movw $16, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    xorl %ecx, %ecx
    xorl %edx, %edx
    movl $0x600E7, %eax /* registers of x87, SSE, AVX, AVX-512 and AMX */
    xsetbv
    movq $stack, %rsp
    call main
2:  hlt
    jmp 2b

.align 8
segments:
    .quad 0, 0x00AF9A000000FFFF, 0x00CF92000000FFFF
descriptor:
    .word 23
    .long segments, 0

.bss
.align 4096
tables: .skip 4096
directories: .skip 4096
pages: .skip 4096
.skip 1048576
.align 64
stack:

.section .note.GNU-stack, "", @progbits
