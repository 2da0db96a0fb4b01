/* Rewrites a JPEG without loss: the same coefficients in one scan, with restart markers and Huffman tables of its own.
 * A library apart from the rest of csrc/, for it alone needs libjpeg. It reads hostile bytes: whatever libjpeg calls an
 * error or warns of ends the attempt, and what was written is read back before it counts. */
#include <setjmp.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <jpeglib.h>

enum { ABI = 1, REFUSED = 0, TOO_LONG = -1 };
enum { LONGEST_SEGMENT = 0xFFFF }; /* of a marker's, so that each is kept whole */

struct errors {
    struct jpeg_error_mgr libjpeg; /* first, for libjpeg knows the rest by it */
    jmp_buf escape;
};

struct rewriting {
    struct errors errors;
    struct jpeg_decompress_struct source, copy;
    struct jpeg_compress_struct output;
    struct jpeg_destination_mgr destination;
};

static void escape(j_common_ptr codec) { longjmp(((struct errors *)codec->err)->escape, 1); }

static boolean refuse_more(j_compress_ptr output) { longjmp(((struct errors *)output->err)->escape, 2); }

static void heed(j_common_ptr codec, int level)
{
    if (level < 0) /* a warning: data that decoders guess at, each in its own way */
        escape(codec);
}

static void create(struct rewriting *r)
{
    jpeg_std_error(&r->errors.libjpeg);
    r->errors.libjpeg.error_exit = escape;
    r->errors.libjpeg.emit_message = heed;
    r->source.err = r->copy.err = r->output.err = &r->errors.libjpeg;
    jpeg_create_decompress(&r->source);
    jpeg_create_decompress(&r->copy);
    jpeg_create_compress(&r->output);
}

static void destroy(struct rewriting *r)
{
    jpeg_destroy_compress(&r->output);
    jpeg_destroy_decompress(&r->copy);
    jpeg_destroy_decompress(&r->source);
}

static jvirt_barray_ptr *read_coefficients(struct jpeg_decompress_struct *jpeg, const uint8_t *data, size_t size)
{
    jpeg_mem_src(jpeg, data, (unsigned long)size);
    jpeg_save_markers(jpeg, JPEG_COM, LONGEST_SEGMENT);
    for (int number = 0; number < 16; number++)
        jpeg_save_markers(jpeg, JPEG_APP0 + number, LONGEST_SEGMENT);
    jpeg_read_header(jpeg, TRUE);
    return jpeg_read_coefficients(jpeg);
}

static void do_nothing(j_compress_ptr output) { (void)output; }

static size_t write_coefficients(struct rewriting *r, jvirt_barray_ptr *coefficients, unsigned interval, uint8_t *out,
                                 size_t capacity)
{
    struct jpeg_compress_struct *output = &r->output;
    r->destination = (struct jpeg_destination_mgr){out, capacity, do_nothing, refuse_more, do_nothing};
    output->dest = &r->destination;
    jpeg_copy_critical_parameters(&r->source, output);
    output->optimize_coding = TRUE;
    output->restart_interval = interval;
    /* The source's own segments say what its colours are; one added here could say something else. */
    output->write_JFIF_header = output->write_Adobe_marker = FALSE;
    jpeg_write_coefficients(output, coefficients);
    for (jpeg_saved_marker_ptr saved = r->source.marker_list; saved != NULL; saved = saved->next)
        jpeg_write_marker(output, saved->marker, saved->data, saved->data_length);
    jpeg_finish_compress(output);
    return capacity - r->destination.free_in_buffer;
}

static int same_segments(jpeg_saved_marker_ptr one, jpeg_saved_marker_ptr other)
{
    while (one != NULL && other != NULL) {
        if (one->marker != other->marker || one->data_length != other->data_length ||
            memcmp(one->data, other->data, one->data_length) != 0)
            return 0;
        one = one->next;
        other = other->next;
    }
    return one == other;
}

static int same_component(struct rewriting *r, int number, jvirt_barray_ptr coefficients, jvirt_barray_ptr copied)
{
    const jpeg_component_info *one = r->source.comp_info + number, *other = r->copy.comp_info + number;
    if (one->component_id != other->component_id || one->h_samp_factor != other->h_samp_factor ||
        one->v_samp_factor != other->v_samp_factor ||
        memcmp(one->quant_table->quantval, other->quant_table->quantval, sizeof one->quant_table->quantval) != 0)
        return 0;
    for (JDIMENSION row = 0; row < one->height_in_blocks; row++) {
        JBLOCKARRAY a = r->source.mem->access_virt_barray((j_common_ptr)&r->source, coefficients, row, 1, FALSE);
        JBLOCKARRAY b = r->copy.mem->access_virt_barray((j_common_ptr)&r->copy, copied, row, 1, FALSE);
        if (memcmp(a[0], b[0], one->width_in_blocks * sizeof(JBLOCK)) != 0)
            return 0;
    }
    return 1;
}

static int same_jpeg(struct rewriting *r, jvirt_barray_ptr *coefficients, jvirt_barray_ptr *copied)
{
    if (r->source.image_width != r->copy.image_width || r->source.image_height != r->copy.image_height ||
        r->source.num_components != r->copy.num_components ||
        r->source.jpeg_color_space != r->copy.jpeg_color_space ||
        !same_segments(r->source.marker_list, r->copy.marker_list))
        return 0;
    for (int number = 0; number < r->source.num_components; number++)
        if (!same_component(r, number, coefficients[number], copied[number]))
            return 0;
    return 1;
}

int nn_restart_abi(void)
{
    struct rewriting r;
    memset(&r, 0, sizeof r);
    /* libjpeg refuses a program that was compiled for another version of it. */
    int usable = setjmp(r.errors.escape) == 0;
    if (usable)
        create(&r);
    destroy(&r);
    return usable ? ABI : 0;
}

/* Bytes written to `out`; TOO_LONG where they are more than `capacity`; REFUSED where libjpeg meets anything that it does
 * not like, or the copy read back is not the source. `interval`: MCUs from one restart marker to the next. */
ptrdiff_t nn_restart_rewrite(const uint8_t *data, size_t size, unsigned interval, uint8_t *out, size_t capacity)
{
    struct rewriting r;
    if (capacity == 0) /* libjpeg writes a byte, then looks whether there is room for more */
        return TOO_LONG;
    memset(&r, 0, sizeof r);
    switch (setjmp(r.errors.escape)) {
    case 0:
        break;
    case 1:
        destroy(&r);
        return REFUSED;
    default:
        destroy(&r);
        return TOO_LONG;
    }
    create(&r);
    jvirt_barray_ptr *coefficients = read_coefficients(&r.source, data, size);
    size_t written = write_coefficients(&r, coefficients, interval, out, capacity);
    int same = same_jpeg(&r, coefficients, read_coefficients(&r.copy, out, written));
    destroy(&r);
    return same ? (ptrdiff_t)written : REFUSED;
}
